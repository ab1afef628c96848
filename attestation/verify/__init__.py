"""Step "verify": what a trace is worth to somebody who was not there."""
