"""Measures what tracing costs: ``python -m benchmarks``."""
