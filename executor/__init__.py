"""Launches and measures a configuration on real hardware."""
