"""Checks and benchmarks of the planner."""
