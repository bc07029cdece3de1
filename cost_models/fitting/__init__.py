"""Fits the operators' constants on tables of measured latencies (SciPy is used here only)."""
