"""Fits calibration files: operators from tables, an engine's constants from measured runs."""
