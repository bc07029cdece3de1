"""Judges what a quantized checkpoint has lost beside the model that it was made from."""
