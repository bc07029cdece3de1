"""Measures what teaches most: the model proposes, the hardware answers, the model learns."""
