"""Benchmarks of AdvFunMatch: ``python -m benchmarks --list`` says what there is."""
