"""What fusing operators saves: kernels that are not launched and bytes that are not moved.

The unfused forms are torch's operators one by one, as a model in eager mode runs them; the
micro-benchmarks time exactly these (`executor/microbench`). Engines run the fused ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

ELEMENT_BYTES = 2
"""Activations between operators are BF16."""

NORM_BYTES, NORM_KERNELS = {True: 8, False: 42}, {True: 1, False: 9}
"""Residual + RMS norm, an element, by whether it is fused.

Fused reads x and residual and writes both sums. One by one: add (6), to float32 (6), square (8),
mean (4), + eps, root, times (8), to BF16 (6), times weight (4).
"""

SWIGLU_BYTES, SWIGLU_KERNELS = {True: 6, False: 10}, {True: 1, False: 2}
"""silu(gate) * up, an element of the product: unfused the activated gate is written and read."""

SCORE_BYTES, MASK_BYTES = 8, 4
"""A score: written, read and written by softmax, read by the second product; the mask's turn."""

SCORE_KERNELS = 3
"""Scaling the queries, softmax and the second product; a prefill has one more for the mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Kernels launched and bytes moved by a chain of operators."""

    kernels: int
    bytes_moved: FloatArray

    def seconds(self, *, launch_s: float, bytes_per_s: float) -> FloatArray:
        """Return the time of kernels that are bound by memory."""
        return np.asarray(self.kernels * launch_s + self.bytes_moved / bytes_per_s)


def norm_traffic(tokens: ArrayLike, width: float, *, fused: bool) -> Traffic:
    """Return what one residual with its RMS norm takes."""
    moved = np.asarray(tokens, np.float64) * width * NORM_BYTES[fused]
    return Traffic(kernels=NORM_KERNELS[fused], bytes_moved=moved)


def swiglu_traffic(tokens: ArrayLike, inter_size: float, *, fused: bool) -> Traffic:
    """Return what one gated activation takes."""
    moved = np.asarray(tokens, np.float64) * inter_size * SWIGLU_BYTES[fused]
    return Traffic(kernels=SWIGLU_KERNELS[fused], bytes_moved=moved)


def unfused_score_traffic(heads: ArrayLike, queries: ArrayLike, keys: ArrayLike) -> Traffic:
    """Return what attention takes beyond the fused kernel when its scores go through memory.

    Args:
        heads: Query heads of all sequences.
        queries: New tokens of a sequence; above 1 they are masked.
        keys: Tokens that each attends to, masked ones included.
    """
    heads, queries, keys = (np.asarray(v, np.float64) for v in (heads, queries, keys))
    masked = queries > 1
    moved = heads * queries * keys * (SCORE_BYTES + MASK_BYTES * masked)
    return Traffic(kernels=SCORE_KERNELS + bool(np.any(masked)), bytes_moved=moved)
