"""Benchmarks, one file per question: ``python -m benchmarks.bench_NAME [--quick] [--json]``."""
