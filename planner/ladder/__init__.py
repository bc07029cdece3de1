"""The progressive pipeline as one command: a model step by step down in precision, side by side."""
