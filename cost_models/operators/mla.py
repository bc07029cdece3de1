"""Seconds of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Prefill expands the latent cache to keys and values per head and runs FlashAttention.
Decode absorbs that expansion into queries and outputs (two batched GEMMs), so that all
heads attend to one latent vector per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.gpu import GpuSpec
from cost_models.operators.flash import (
    TILE_TOKENS,
    longest_tile,
    tile_count,
    visited_keys,
)
from cost_models.operators.grid import ResidualGrid
from cost_models.operators.roofline import p_norm

FloatArray = NDArray[np.float64]

ACTIVATION_BYTES = 2
"""Queries, expanded keys and values, and outputs are BF16."""

KEY_DIM = 192
"""Width of an expanded query or key: 128 without and 64 with rotary embedding."""

VALUE_DIM = 128
"""Width of an expanded value."""

LATENT_DIM = 512
"""Width of the latent that keys and values share (kv_lora_rank)."""

CACHE_DIM = 576
"""Cached elements of a token: the latent and the rotary key."""

HEAD_DIM = 128
"""Width of a head before absorption (qk_nope_head_dim and v_head_dim)."""

HEAD_TILE = 64
"""Query heads that a decode kernel pads to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaPrefillParams:
    """Constants of MLA prefill for one KV-cache dtype on one GPU."""

    compute: str
    """Tensor-core rate: a key of `GpuSpec.flop_per_s`."""
    launch_s: float
    hbm_efficiency: float
    latent_passes: float
    """How often the new latents are read and written: rotary embedding, append to the cache."""
    compute_efficiency: float
    tile_s: float
    """Prologue and epilogue of one tile of queries."""
    longest_tile_share: float
    """How much of the longest tile sticks out at the end."""
    norm: float
    """Order of the p-norm that joins throughput and the longest tile."""
    residual: ResidualGrid | None = None
    """Over (keys, heads of all sequences)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaDecodeParams:
    """Constants of MLA decode for one KV-cache dtype on one GPU."""

    compute: str
    """Tensor-core rate: a key of `GpuSpec.flop_per_s`."""
    kv_bytes: float
    """Bytes of a cached element."""
    launch_s: float
    hbm_efficiency: float
    compute_efficiency: float
    sequence_s: float
    """Prologue and epilogue of one sequence and tile of heads."""
    split_s: float
    """Merging a context that was split over SMs."""
    split_tokens: float
    """Length at which splitting costs half of that."""
    head_passes: float
    """How often queries and outputs of all heads are read or written, with partial sums."""
    norm: float
    """Order of the p-norm that joins arithmetic and memory traffic."""
    residual: ResidualGrid | None = None
    """Over (kv_len, sequences, heads)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaBmmParams:
    """Constants of one absorption GEMM for one dtype on one GPU."""

    compute: str
    """Tensor-core rate: a key of `GpuSpec.flop_per_s`."""
    weight_bytes: float
    launch_s: float
    hbm_efficiency: float
    compute_efficiency: float
    tile_s: float
    """Prologue and epilogue of one tile."""
    norm: float
    """Order of the p-norm that joins arithmetic and memory traffic."""
    residual: ResidualGrid | None = None
    """Over (tokens, heads)."""


def mla_prefill_seconds(
    num_heads: ArrayLike,
    tokens: ArrayLike,
    past: ArrayLike,
    num_sequences: ArrayLike,
    *,
    gpu: GpuSpec,
    params: MlaPrefillParams,
) -> FloatArray:
    """Return the time in which a batch of prompt chunks attends to its past and itself.

    The expansion of cached latents to keys and values is a linear layer of its own.

    Args:
        num_heads: Query heads on this rank.
        tokens: New tokens of each sequence.
        past: Tokens of each sequence that are in the cache already.
        num_sequences: Sequences in the batch.
        gpu: Where it runs.
        params: Constants of the KV-cache dtype.
    """
    tokens, past, num_sequences = (np.asarray(v, np.float64) for v in (tokens, past, num_sequences))
    heads = num_sequences * np.asarray(num_heads, np.float64)
    flop_per_s = params.compute_efficiency * gpu.peak_flop_per_s(params.compute)
    key_s = 2 * TILE_TOKENS * (KEY_DIM + VALUE_DIM) * gpu.num_sms / flop_per_s
    keys = visited_keys(tokens, past, np.inf)
    work_s = heads * (keys * key_s + tile_count(tokens) * params.tile_s) / gpu.num_sms
    last_s = params.longest_tile_share * (
        longest_tile(tokens, past, np.inf) * key_s + params.tile_s
    )
    per_head = tokens * (KEY_DIM + VALUE_DIM) + (tokens + past) * (KEY_DIM + VALUE_DIM)
    latents = num_sequences * tokens * 2 * CACHE_DIM
    traffic_bytes = ACTIVATION_BYTES * (heads * per_head + params.latent_passes * latents)
    traffic_s = traffic_bytes / (params.hbm_efficiency * gpu.hbm_bytes_per_s)
    seconds = params.launch_s + traffic_s + p_norm(work_s, last_s, params.norm)
    if params.residual is None:
        return np.asarray(seconds)
    length = tokens + past
    whole_prompts = heads * keys / visited_keys(length, np.zeros(()), np.inf)
    return np.asarray(seconds * params.residual.factor(length, whole_prompts))


def mla_decode_seconds(
    num_heads: ArrayLike,
    num_sequences: ArrayLike,
    kv_len: ArrayLike,
    *,
    gpu: GpuSpec,
    params: MlaDecodeParams,
) -> FloatArray:
    """Return the time in which one new token of each sequence attends to its latent cache.

    Args:
        num_heads: Query heads on this rank.
        num_sequences: Sequences in the batch.
        kv_len: Cached tokens of each sequence (their mean).
        gpu: Where it runs.
        params: Constants of the KV-cache dtype.
    """
    num_heads, num_sequences, kv_len = (
        np.asarray(v, np.float64) for v in (num_heads, num_sequences, kv_len)
    )
    tiles = np.ceil(num_heads / HEAD_TILE)
    flop = 2 * num_sequences * tiles * HEAD_TILE * kv_len * (CACHE_DIM + LATENT_DIM)
    flop_per_s = params.compute_efficiency * gpu.peak_flop_per_s(params.compute)
    cache_bytes = num_sequences * kv_len * CACHE_DIM * params.kv_bytes
    memory_s = cache_bytes / (params.hbm_efficiency * gpu.hbm_bytes_per_s)
    split_s = params.split_s * kv_len / (kv_len + params.split_tokens)
    blocks_s = params.sequence_s * num_sequences * tiles / gpu.num_sms
    head_bytes = num_sequences * num_heads * (CACHE_DIM + LATENT_DIM) * ACTIVATION_BYTES
    heads_s = params.head_passes * head_bytes / gpu.hbm_bytes_per_s
    joined_s = p_norm(flop / flop_per_s, memory_s, params.norm)
    seconds = params.launch_s + split_s + blocks_s + heads_s + joined_s
    if params.residual is None:
        return np.asarray(seconds)
    return np.asarray(seconds * params.residual.factor(kv_len, num_sequences, num_heads))


def mla_bmm_seconds(
    num_heads: ArrayLike, num_tokens: ArrayLike, *, gpu: GpuSpec, params: MlaBmmParams
) -> FloatArray:
    """Return the time of one absorption: per head, [tokens, 128] × [128, 512] or its transpose.

    Args:
        num_heads: Query heads on this rank.
        num_tokens: Tokens that decode.
        gpu: Where it runs.
        params: Constants of the operation (before or after attention) and dtype.
    """
    num_heads, num_tokens = (np.asarray(v, np.float64) for v in (num_heads, num_tokens))
    row_tiles = np.ceil(np.maximum(num_tokens, 1.0) / TILE_TOKENS)
    flop = 2 * num_heads * num_tokens * HEAD_DIM * LATENT_DIM
    arithmetic_s = flop / (params.compute_efficiency * gpu.peak_flop_per_s(params.compute))
    tiles_s = params.tile_s * num_heads * row_tiles / gpu.num_sms
    weights = HEAD_DIM * LATENT_DIM * params.weight_bytes
    activations = num_tokens * (HEAD_DIM + LATENT_DIM) * ACTIVATION_BYTES
    memory_s = num_heads * (weights + activations) / (params.hbm_efficiency * gpu.hbm_bytes_per_s)
    seconds = params.launch_s + p_norm(arithmetic_s + tiles_s, memory_s, params.norm)
    if params.residual is None:
        return np.asarray(seconds)
    return np.asarray(seconds * params.residual.factor(num_tokens, num_heads))
