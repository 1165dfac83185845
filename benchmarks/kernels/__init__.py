"""Benchmarks of the kernels: every op, shape family, data type and mode, against the peers."""
