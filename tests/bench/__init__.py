"""Benchmarks: run as modules, they print figures and check nothing."""
