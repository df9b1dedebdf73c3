"""Benchmarks of the cost of tracing: ``python -m benchmarks``."""
