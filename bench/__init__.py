"""Benchmarks: ``pytest bench --benchmark-only`` from the repository root."""
