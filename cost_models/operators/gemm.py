"""Seconds of a linear layer, Y[m, n] = X[m, k] · W[n, k]ᵀ, on tensor cores.

The kernel library is taken to pick the cheapest of a set of tiles and split-K factors;
a tile costs the larger of its arithmetic and its share of memory traffic, rows are
padded to the tile, and the grid of tiles fills the SMs in waves that overlap
(persistent kernels). A residual grid over (m, n, k) carries what this leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.gpu import GpuSpec
from cost_models.operators.grid import ResidualGrid
from cost_models.operators.roofline import p_norm

FloatArray = NDArray[np.float64]

TILES = (
    (64, 16), (64, 32), (64, 64), (64, 128), (64, 256),
    (128, 16), (128, 32), (128, 64), (128, 128), (128, 256),
)  # fmt: skip
"""Output tiles of the library's kernels; each is tried in both orientations."""

SPLITS = (1, 2, 4, 8, 16)
"""Factors by which K is split over SMs."""

BENCHMARK_COPIES = 5
"""Copies of the weights that the benchmark cycles through, if fewer do not exceed L2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmParams:
    """Constants of one dtype on one GPU."""

    compute: str
    """Tensor-core rate: a key of `GpuSpec.flop_per_s`."""
    weight_bytes: float
    """Bytes of one weight in memory."""
    activation_bytes: float
    """Bytes of one activation as the kernel reads it."""
    launch_s: float
    """Fixed time of the kernel."""
    cast_s: float
    """Fixed time of the kernel that narrows activations to a scale that is known."""
    scale_s: float
    """Fixed time of finding one activation scale per tensor at run time; 0 for formats
    whose cast finds the scales of its blocks itself."""
    quantize_bytes_per_s: float
    """Rate at which activations are read and rewritten narrow; 0 when they are not."""
    compute_efficiency: float
    hbm_efficiency: float
    l2_speedup: float
    """L2 bandwidth over HBM bandwidth."""
    l2_share: float
    """Bytes that stay in L2 between two runs, over the size of L2."""
    l2_sharpness: float
    """Steepness of the fall of the hit rate where the bytes touched exceed that."""
    roofline_norm: float
    """Order of the p-norm that joins arithmetic and memory time."""
    sm_bytes_per_s: float
    """Rate at which one SM loads operand tiles."""
    tile_s: float
    """Prologue and epilogue of one tile."""
    split_s: float
    """Fixed time of adding the parts of a split K."""
    wave_rounding: float
    """0: waves of tiles overlap fully; 1: each waits for the last."""
    timed_warm: bool
    """The benchmark left small weights in L2 (see `BENCHMARK_COPIES`)."""
    residual: ResidualGrid | None = None
    """Over (m, n, k)."""


def gemm_seconds(  # noqa: PLR0913  three sizes and two switches beside gpu and params
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    *,
    gpu: GpuSpec,
    params: GemmParams,
    weights_cold: bool = False,
    static_scales: bool = False,
) -> FloatArray:
    """Return the time of Y[m, n] = X[m, k] · W[n, k]ᵀ, in seconds.

    Args:
        m: Tokens.
        n: Output features on this rank.
        k: Input features on this rank.
        gpu: Where it runs.
        params: Constants of the dtype.
        weights_cold: Read all weights from HBM, as a model does whose layers follow
            each other; the tables timed small weights while they were in L2.
        static_scales: Activation scales come with the checkpoint, so that the norm or
            activation before the layer writes them narrow and nothing remains of the
            dynamic quantization that the tables include.
    """
    m, n, k = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (m, n, k)))
    kernel_s = _kernel_seconds(m, n, k, gpu=gpu, params=params, weights_cold=weights_cold)
    total = kernel_s + _quantize_seconds(m, k, params, static_scales=static_scales)
    if params.residual is not None:
        total = total * params.residual.factor(m, n, k)
    return total


def _quantize_seconds(
    m: FloatArray, k: FloatArray, params: GemmParams, *, static_scales: bool
) -> FloatArray:
    """Read BF16 activations and write them narrow; before that, read them for their scale."""
    if not params.quantize_bytes_per_s or (static_scales and params.scale_s):
        return np.zeros(())
    read_s = 2 * m * k / params.quantize_bytes_per_s
    cast_s = params.cast_s + read_s + params.activation_bytes * m * k / params.quantize_bytes_per_s
    if not params.scale_s:
        return cast_s
    return params.scale_s + read_s + cast_s


def _kernel_seconds(
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
    *,
    gpu: GpuSpec,
    params: GemmParams,
    weights_cold: bool,
) -> FloatArray:
    memory_s = _memory_seconds(m, n, k, gpu=gpu, params=params, weights_cold=weights_cold)
    flop_per_s = params.compute_efficiency * gpu.peak_flop_per_s(params.compute) / gpu.num_sms
    l2_bytes_per_s = params.l2_speedup * params.hbm_efficiency * gpu.hbm_bytes_per_s
    best = np.full(m.shape, np.inf)
    for (rows, cols), split in product(_both_ways(TILES), SPLITS):
        arithmetic = 2 * rows * cols / flop_per_s
        operand_bytes = rows * params.activation_bytes + cols * params.weight_bytes
        per_k_s = np.hypot(arithmetic, operand_bytes / params.sm_bytes_per_s)
        waves = _waves(np.ceil(m / rows) * np.ceil(n / cols) * split / gpu.num_sms, params)
        seconds = p_norm(
            waves * (per_k_s * k / split + params.tile_s), memory_s, params.roofline_norm
        )
        if split > 1:
            seconds = seconds + params.split_s + 4 * m * n * split / l2_bytes_per_s
        best = np.minimum(best, seconds)
    return params.launch_s + best


def _waves(tiles_per_sm: FloatArray, params: GemmParams) -> FloatArray:
    """Rounds of tiles that an SM works through, one at least."""
    rounding = params.wave_rounding
    return np.maximum(rounding * np.ceil(tiles_per_sm) + (1 - rounding) * tiles_per_sm, 1.0)


def _memory_seconds(
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
    *,
    gpu: GpuSpec,
    params: GemmParams,
    weights_cold: bool,
) -> FloatArray:
    """Operands and result through HBM, or L2 for the share that the benchmark left there."""
    hbm_bytes_per_s = params.hbm_efficiency * gpu.hbm_bytes_per_s
    weights = params.weight_bytes * n * k
    inputs, outputs = params.activation_bytes * m * k, 2 * m * n
    copies = np.clip(np.ceil(gpu.l2_bytes / weights), 1, BENCHMARK_COPIES)
    touched = copies * weights + inputs + outputs
    hit_rate = 1 / (1 + (touched / (params.l2_share * gpu.l2_bytes)) ** params.l2_sharpness)
    hits = hit_rate * (inputs if weights_cold or not params.timed_warm else weights + inputs)
    misses = weights + inputs - hits
    return (hits / params.l2_speedup + misses + outputs) / hbm_bytes_per_s


def _both_ways(tiles: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    return sorted({*tiles, *((cols, rows) for rows, cols in tiles)})
