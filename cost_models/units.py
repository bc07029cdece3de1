"""Units in which people read what is SI inside."""

MIB, GIB = float(1 << 20), float(1 << 30)
"""Bytes."""
