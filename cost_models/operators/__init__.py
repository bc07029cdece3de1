"""Seconds of one operator on one GPU: a physical form, fitted constants, a small residual grid.

Each module holds the formula and its parameters; how they are fitted is in
`cost_models.fitting`. Every function takes arrays and broadcasts.
"""
