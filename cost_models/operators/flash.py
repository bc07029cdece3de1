"""What the attention kernels share: tiles of queries that walk over cached keys."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

TILE_TOKENS = 128
"""Queries of a tile, and keys that it visits at a time."""


def tile_count(tokens: FloatArray) -> FloatArray:
    """Return the query tiles of one sequence and head."""
    return np.ceil(np.maximum(tokens, 1.0) / TILE_TOKENS)


def visited_keys(tokens: FloatArray, past: FloatArray, reach: FloatArray | float) -> FloatArray:
    """Return the keys that all query tiles of one sequence and head visit.

    The i-th tile ends at key past + 128·i; a causal mask skips what lies beyond, a
    sliding window what lies further back than `reach`:
    Σᵢ min(past + 128·i, reach).

    Args:
        tokens: New tokens of the sequence.
        past: Tokens already cached.
        reach: Most keys that one tile visits; infinite for full attention.
    """
    tiles = tile_count(tokens)
    growing = np.clip(np.floor((reach - past) / TILE_TOKENS), 0.0, tiles)
    capped = tiles - growing
    growing_keys = growing * past + TILE_TOKENS * growing * (growing + 1) / 2
    return np.asarray(growing_keys + np.where(capped > 0, capped * _finite(reach), 0.0))


def longest_tile(tokens: FloatArray, past: FloatArray, reach: FloatArray | float) -> FloatArray:
    """Return the keys that the last tile of a sequence visits."""
    return np.asarray(np.minimum(past + TILE_TOKENS * tile_count(tokens), reach))


def _finite(reach: FloatArray | float) -> FloatArray:
    return np.where(np.isfinite(reach), reach, 0.0)
