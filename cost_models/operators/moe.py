"""Seconds of a mixture-of-experts layer on the busiest rank: permute, grouped GEMMs, combine.

The weights of every expert that some token chose are read once, while the rows of all
chosen experts are multiplied; the larger of both rules. Permuting and summing read and
write activations, and routing costs a little for every choice and every expert. The
router's own GEMM and the communication between ranks are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.gpu import GpuSpec
from cost_models.operators.grid import ResidualGrid
from cost_models.operators.roofline import p_norm
from cost_models.operators.routing import RankLoad, busiest_rank_load

FloatArray = NDArray[np.float64]

SERVING_ALPHA = 1.01
"""Exponent of expert popularity under real prompts."""

ELEMENT_BYTES = 2
"""Activations enter and leave the layer in 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """One layer of experts and how it is split over ranks."""

    hidden_size: int
    inter_size: int
    """Width of one expert before it is split."""
    top_k: int
    num_experts: int
    moe_tp_size: int
    """Ranks that share the width of each expert."""
    moe_ep_size: int
    """Ranks that share the set of experts."""
    gated: bool = True
    """Whether an expert multiplies two up-projections (SwiGLU) or has one."""

    @property
    def local_inter_size(self) -> int:
        """Width of one expert on a rank."""
        return -(-self.inter_size // self.moe_tp_size)

    @property
    def local_experts(self) -> int:
        """Experts that a rank holds."""
        return -(-self.num_experts // self.moe_ep_size)

    @property
    def local_weights(self) -> int:
        """Weights of one expert on a rank."""
        return (3 if self.gated else 2) * self.hidden_size * self.local_inter_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeParams:
    """Constants of one dtype on one GPU."""

    compute: str
    """Tensor-core rate: a key of `GpuSpec.flop_per_s`."""
    weight_bits: float
    """Bits of one weight in memory, with its share of the scales."""
    launch_s: float
    """Fixed time of routing, permutation, two grouped GEMMs and the final sum."""
    choice_s: float
    """Finding one more of the `top_k` experts, once for all tokens."""
    pair_s: float
    """Sorting one (token, expert) pair; every rank sorts the pairs of all ranks."""
    logit_s: float
    """Bookkeeping of one expert of the layer, wherever it lives."""
    expert_s: float
    """Bookkeeping of one expert on the rank."""
    compute_efficiency: float
    hbm_efficiency: float
    l2_speedup: float
    """L2 bandwidth over HBM bandwidth."""
    roofline_norm: float
    """Order of the p-norm that joins arithmetic and weight time."""
    tile_rows: float
    """Rows by which each active expert is padded on average."""
    narrow_width: float
    """Expert width at which half of the arithmetic rate is lost."""
    plain_factor: float
    """How much longer an expert without a gate takes than its weights and rows explain."""
    activation_efficiency: float
    """Share of HBM bandwidth at which activations are moved."""
    residual: ResidualGrid | None = None
    """Over (num_tokens, local_experts, local_inter_size, top_k, 1 + power_law_alpha)."""


def moe_seconds(
    shape: MoeShape,
    num_tokens: ArrayLike,
    *,
    gpu: GpuSpec,
    params: MoeParams,
    power_law_alpha: float = SERVING_ALPHA,
    weight_bits: float | None = None,
) -> FloatArray:
    """Return the time of one layer of experts on its busiest rank, in seconds.

    Args:
        shape: The layer and its split.
        num_tokens: Tokens that enter the layer over all expert-parallel ranks.
        gpu: Where it runs.
        params: Constants of the dtype.
        power_law_alpha: Exponent of expert popularity; 0 is balanced.
        weight_bits: Bits of a stored weight, where a format without constants of its
            own borrows those of `params`.
    """
    load = expert_load(shape, num_tokens, power_law_alpha)
    return loaded_moe_seconds(
        shape,
        load,
        gpu=gpu,
        params=params,
        power_law_alpha=power_law_alpha,
        weight_bits=weight_bits,
    )


def expert_load(shape: MoeShape, num_tokens: ArrayLike, power_law_alpha: float) -> RankLoad:
    """Return what so many tokens are for the busiest rank of a layer, whatever its constants."""
    return busiest_rank_load(
        num_tokens,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        num_ranks=shape.moe_ep_size,
        power_law_alpha=power_law_alpha,
    )


def loaded_moe_seconds(
    shape: MoeShape,
    load: RankLoad,
    *,
    gpu: GpuSpec,
    params: MoeParams,
    power_law_alpha: float,
    weight_bits: float | None = None,
) -> FloatArray:
    """Return the same as `moe_seconds` under a load that `expert_load` has worked out."""
    tokens = load.num_tokens
    bits = params.weight_bits if weight_bits is None else weight_bits
    experts_s = p_norm(
        _arithmetic_seconds(shape, load, gpu, params),
        _weight_seconds(shape, load, weight_bits=bits, gpu=gpu, params=params),
        params.roofline_norm,
    )
    seconds = (
        _routing_seconds(shape, tokens, params)
        + (1.0 if shape.gated else params.plain_factor) * experts_s
        + _activation_seconds(shape, tokens, load, gpu=gpu, params=params)
    )
    if params.residual is None:
        return np.asarray(seconds)
    width, alpha = shape.local_inter_size, 1 + power_law_alpha
    factor = params.residual.factor(tokens, shape.local_experts, width, shape.top_k, alpha)
    return np.asarray(seconds * factor)


def _routing_seconds(shape: MoeShape, tokens: FloatArray, params: MoeParams) -> FloatArray:
    """Launches, and finding, counting and sorting what the tokens chose."""
    return np.asarray(
        params.launch_s
        + params.choice_s * shape.top_k
        + params.pair_s * shape.top_k * tokens
        + params.logit_s * shape.num_experts
        + params.expert_s * shape.local_experts
    )


def _weight_seconds(
    shape: MoeShape, load: RankLoad, *, weight_bits: float, gpu: GpuSpec, params: MoeParams
) -> FloatArray:
    """Weights of the active experts; sets smaller than L2 were timed while they lay there."""
    size = load.active_experts * shape.local_weights * weight_bits / 8
    in_l2 = 1 / (1 + (size / gpu.l2_bytes) ** 3)
    hbm_s = size / (params.hbm_efficiency * gpu.hbm_bytes_per_s)
    return np.asarray(hbm_s * (1 - in_l2 + in_l2 / params.l2_speedup))


def _arithmetic_seconds(
    shape: MoeShape, load: RankLoad, gpu: GpuSpec, params: MoeParams
) -> FloatArray:
    """Two FLOP for each weight and row, with rows padded to tiles expert by expert."""
    rows = load.assignments + params.tile_rows * load.active_experts
    narrow = 1 + params.narrow_width / shape.local_inter_size
    flop_per_s = params.compute_efficiency * gpu.peak_flop_per_s(params.compute)
    return np.asarray(2 * rows * shape.local_weights * narrow / flop_per_s)


def _activation_seconds(
    shape: MoeShape,
    tokens: FloatArray,
    load: RankLoad,
    *,
    gpu: GpuSpec,
    params: MoeParams,
) -> FloatArray:
    """Tokens in and out; rows permuted in, widened by the experts, and summed out."""
    row_elements = 2 * shape.hidden_size + (3 if shape.gated else 2) * shape.local_inter_size
    elements = 2 * tokens * shape.hidden_size + load.assignments * row_elements
    rate = params.activation_efficiency * gpu.hbm_bytes_per_s
    return np.asarray(elements * ELEMENT_BYTES / rate)
