"""Step "verify": parts of a log to hand on, and checking one that was handed on."""
