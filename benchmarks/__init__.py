"""Benchmarks: one file per question, run as ``python -m benchmarks.bench_NAME [--quick] [--json]``."""
