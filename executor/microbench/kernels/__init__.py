"""Triton kernels that the micro-benchmarks time; imported only where Triton is installed."""
