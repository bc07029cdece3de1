"""Measured runs: how they are read, and how new ones are made."""
