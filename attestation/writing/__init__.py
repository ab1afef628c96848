"""Step "record": the writer of one trace and what happens behind it."""
