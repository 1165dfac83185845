"""Attacks timed against the loops that people run today: ``python -m benchmarks.attack``."""
