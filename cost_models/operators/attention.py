"""Seconds of attention with keys and values per KV head (MHA, GQA, MQA).

Prefill is FlashAttention: tiles of 128 queries walk over the keys that the causal mask
and the window leave them (Dao 2023, arXiv:2307.08691). Decode is Flash-Decoding: each
sequence and head is a block of work, long contexts are split over more blocks and
merged. TensorRT-LLM has two decode kernels: XQA works on all query heads of a KV head
at once, masked multi-head attention (MMHA) on one query head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

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
"""Queries, new keys and values, and outputs are BF16."""

XQA_MAX_GROUP = 32
"""Most query heads per KV head that XQA takes; wider groups run MMHA."""

XQA_BLOCK_TOKENS = 128
"""Cached tokens that count as one block where TensorRT-LLM picks the kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionHeads:
    """One layer's attention on one rank; fields may be arrays that broadcast."""

    num_heads: ArrayLike
    num_kv_heads: ArrayLike
    head_dim: ArrayLike
    window_size: ArrayLike = 0
    """Sliding window in tokens; 0 is full attention."""

    @property
    def group_size(self) -> FloatArray:
        """Query heads that share a KV head."""
        return np.asarray(self.num_heads, np.float64) / np.asarray(self.num_kv_heads, np.float64)

    def windows_in(self, length: FloatArray) -> FloatArray:
        """Return how many windows a sequence spans; 1 where the window cuts nothing off."""
        window = np.asarray(self.window_size, np.float64)
        return np.where(window > 0, np.maximum(length / np.maximum(window, 1.0), 1.0), 1.0)

    def reach(self, padding_tokens: float) -> FloatArray:
        """Most cached tokens that are visited: the window and what its edges waste."""
        window = np.asarray(self.window_size, np.float64)
        return np.where(window > 0, window + padding_tokens, np.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillAttentionParams:
    """Constants of prefill attention for one KV-cache dtype on one GPU."""

    compute: str
    """Tensor-core rate: a key of `GpuSpec.flop_per_s`."""
    kv_bytes: float
    """Bytes of a cached element."""
    launch_s: float
    """Fixed time of the rotary and attention kernels."""
    hbm_efficiency: float
    compute_efficiency: Mapping[str, float]
    """Share of the peak that the inner loop reaches, by head_dim."""
    tile_s: float
    """Prologue and epilogue of one tile of queries."""
    longest_tile_share: float
    """How much of the longest tile sticks out at the end."""
    norm: float
    """Order of the p-norm that joins throughput and the longest tile."""
    window_padding_tokens: float
    """Keys beyond window and tile that a tile of a sliding window visits."""
    residual: ResidualGrid | None = None
    """Over `prefill_coordinates`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeKernel:
    """Constants of one decode kernel."""

    launch_s: float
    block_s: float
    """Prologue and epilogue of one block of work."""
    sm_speed: float
    """Rate at which one SM goes through keys and values, over its share of HBM bandwidth."""
    hbm_efficiency: float
    l2_speedup: float
    """Bandwidth to a cache that fits L2, over HBM's."""
    l2_share: float
    """Share of L2 that a cache may fill before it spills."""
    split_tokens: float
    """Cached tokens for which one more split is opened."""
    split_blocks_per_sm: float
    """Blocks per SM at which splitting stops."""
    merge_s: float
    """Adding up the splits."""
    norm: float
    """Order of the p-norm that joins the blocks' work with memory traffic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeAttentionParams:
    """Constants of decode attention for one KV-cache dtype on one GPU."""

    kv_bytes: float
    """Bytes of a cached element."""
    xqa: Mapping[str, float]
    """`DecodeKernel` of XQA."""
    mmha: Mapping[str, float]
    """`DecodeKernel` of masked multi-head attention."""
    xqa_min_blocks_per_sm: float
    """Load below which MMHA, which splits work finer, serves in XQA's place."""
    window_padding_tokens: float
    """Cached tokens beyond the window that are read."""
    xqa_residual: ResidualGrid | None = None
    """Over `decode_coordinates` of the KV heads."""
    mmha_residual: ResidualGrid | None = None
    """Over `decode_coordinates` of the query heads."""


def prefill_attention_seconds(
    shape: AttentionHeads,
    tokens: ArrayLike,
    past: ArrayLike,
    num_sequences: ArrayLike,
    *,
    gpu: GpuSpec,
    params: PrefillAttentionParams,
) -> FloatArray:
    """Return the time in which a batch of prompt chunks attends to its past and itself.

    Args:
        shape: Heads of one layer on one rank.
        tokens: New tokens of each sequence.
        past: Tokens of each sequence that are in the cache already.
        num_sequences: Sequences in the batch.
        gpu: Where it runs.
        params: Constants of the KV-cache dtype.
    """
    chunk = Chunk.of(tokens, past, num_sequences)
    seconds = _prefill_seconds(shape, chunk, gpu=gpu, params=params)
    if params.residual is None:
        return seconds
    return np.asarray(seconds * params.residual.factor(*prefill_coordinates(shape, chunk)))


def prefill_coordinates(shape: AttentionHeads, chunk: Chunk) -> tuple[FloatArray, ...]:
    """Return where the residual of a prefill is looked up.

    Heads of all sequences count alike, whichever sequence they belong to. A chunk with
    a past is looked up at its full length and at the number of whole prompts of the
    same work.

    Returns:
        Keys, heads of all sequences, query heads per KV head, head_dim, windows in a
        sequence.
    """
    all_keys = visited_keys(chunk.tokens, chunk.past, np.inf)
    length = chunk.tokens + chunk.past
    whole_prompts = all_keys / visited_keys(length, np.zeros(()), np.inf)
    heads = chunk.num_sequences * np.asarray(shape.num_heads, np.float64) * whole_prompts
    head_dim = np.asarray(shape.head_dim, np.float64)
    return length, heads, shape.group_size, head_dim, shape.windows_in(length)


def decode_attention_seconds(
    shape: AttentionHeads,
    num_sequences: ArrayLike,
    kv_len: ArrayLike,
    *,
    gpu: GpuSpec,
    params: DecodeAttentionParams,
    cache_cold: bool = False,
) -> FloatArray:
    """Return the time in which one new token of each sequence attends to its cache.

    Args:
        shape: Heads of one layer on one rank.
        num_sequences: Sequences in the batch.
        kv_len: Cached tokens of each sequence (their mean).
        gpu: Where it runs.
        params: Constants of the KV-cache dtype.
        cache_cold: Read all keys and values from HBM, as a model does whose layers
            follow each other; the tables timed small caches while they were in L2.
    """
    num_sequences, kv_len = (np.asarray(v, np.float64) for v in (num_sequences, kv_len))
    on_xqa = runs_xqa(shape, num_sequences, kv_len, gpu=gpu, params=params)
    seconds = np.zeros(np.broadcast_shapes(on_xqa.shape, np.shape(shape.head_dim)))
    for rows, heads, constants, residual in (
        (on_xqa, shape.num_kv_heads, params.xqa, params.xqa_residual),
        (~on_xqa, shape.num_heads, params.mmha, params.mmha_residual),
    ):
        if not rows.any():
            continue
        kernel, factor = DecodeKernel(**constants), np.ones(())
        load = _load(shape, heads, num_sequences, kv_len, params)
        if residual is not None:
            factor = residual.factor(*decode_coordinates(shape, heads, num_sequences, kv_len))
        warm_s = _decode_seconds(load, gpu=gpu, kernel=kernel, cache_cold=False)
        cold_s = _decode_seconds(load, gpu=gpu, kernel=kernel, cache_cold=cache_cold)
        seconds = np.where(rows, warm_s * factor + (cold_s - warm_s), seconds)
    return seconds


def cache_bytes(
    shape: AttentionHeads,
    num_sequences: ArrayLike,
    kv_len: ArrayLike,
    *,
    params: DecodeAttentionParams,
) -> FloatArray:
    """Return the bytes of keys and values that one layer's decode attention reads."""
    read_len = np.minimum(kv_len, shape.reach(params.window_padding_tokens))
    row_bytes = 2 * np.asarray(shape.head_dim, np.float64) * params.kv_bytes
    sequences = np.asarray(num_sequences, np.float64)
    return np.asarray(sequences * np.asarray(shape.num_kv_heads) * read_len * row_bytes)


def runs_xqa(
    shape: AttentionHeads,
    num_sequences: ArrayLike,
    kv_len: ArrayLike,
    *,
    gpu: GpuSpec,
    params: DecodeAttentionParams,
) -> NDArray[np.bool_]:
    """Return where TensorRT-LLM picks XQA: grouped heads, and enough blocks to fill the GPU."""
    group = shape.group_size
    per_head = np.maximum(np.floor(np.asarray(kv_len) / XQA_BLOCK_TOKENS), 1.0)
    blocks = np.asarray(num_sequences) * np.asarray(shape.num_kv_heads) * per_head
    busy = blocks >= params.xqa_min_blocks_per_sm * gpu.num_sms
    return np.asarray((group > 1) & (group <= XQA_MAX_GROUP) & busy)


def decode_coordinates(
    shape: AttentionHeads,
    heads: ArrayLike,
    num_sequences: ArrayLike,
    kv_len: ArrayLike,
) -> tuple[FloatArray, ...]:
    """Return where the residual of a decode kernel is looked up.

    Args:
        shape: Heads of one layer on one rank.
        heads: The heads that the kernel works on one by one: KV heads (XQA) or query
            heads (MMHA).
        num_sequences: Sequences in the batch.
        kv_len: Cached tokens of each sequence.

    Returns:
        kv_len, heads of all sequences, query heads per KV head, head_dim, windows in a
        sequence.
    """
    kv_len = np.asarray(kv_len, np.float64)
    blocks = np.asarray(num_sequences, np.float64) * np.asarray(heads)
    head_dim = np.asarray(shape.head_dim, np.float64)
    return kv_len, blocks, shape.group_size, head_dim, shape.windows_in(kv_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New tokens of a batch of sequences, and what each has in the cache already."""

    tokens: FloatArray
    past: FloatArray
    num_sequences: FloatArray

    @classmethod
    def of(cls, tokens: ArrayLike, past: ArrayLike, num_sequences: ArrayLike) -> Self:
        """Return the same as arrays of floats."""
        return cls(
            tokens=np.asarray(tokens, np.float64),
            past=np.asarray(past, np.float64),
            num_sequences=np.asarray(num_sequences, np.float64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeLoad:
    """What a decode kernel has to do."""

    blocks: FloatArray
    """Blocks of work before splitting: heads of all sequences."""
    kv_len: FloatArray
    read_len: FloatArray
    row_bytes: FloatArray
    """One cached key and value."""
    cache_bytes: FloatArray


def _prefill_seconds(
    shape: AttentionHeads, chunk: Chunk, *, gpu: GpuSpec, params: PrefillAttentionParams
) -> FloatArray:
    """Launch + memory traffic + tiles, which the longest tile outlasts."""
    head_dim = np.asarray(shape.head_dim, np.float64)
    sm_flop_per_s = _flop_per_s(head_dim, gpu, params) / gpu.num_sms
    key_s = 4 * TILE_TOKENS * head_dim / sm_flop_per_s
    tiles = tile_count(chunk.tokens)
    reach = shape.reach(TILE_TOKENS + params.window_padding_tokens)
    visited = visited_keys(chunk.tokens, chunk.past, reach)
    one_head_s = visited * key_s + tiles * params.tile_s
    work_s = chunk.num_sequences * np.asarray(shape.num_heads) * one_head_s / gpu.num_sms
    longest = longest_tile(chunk.tokens, chunk.past, reach)
    last_s = params.longest_tile_share * (longest * key_s + params.tile_s)
    hbm_bytes_per_s = params.hbm_efficiency * gpu.hbm_bytes_per_s
    traffic_s = _prefill_bytes(shape, chunk, params.kv_bytes) / hbm_bytes_per_s
    return np.asarray(params.launch_s + traffic_s + p_norm(work_s, last_s, params.norm))


def _prefill_bytes(shape: AttentionHeads, chunk: Chunk, kv_bytes: float) -> FloatArray:
    """Rotary embedding reads and writes Q, K, V; attention reads Q, writes O; past K, V once."""
    heads, kv_heads = np.asarray(shape.num_heads), np.asarray(shape.num_kv_heads)
    new = chunk.tokens * (4 * heads + 4 * kv_heads) * ACTIVATION_BYTES
    cached = np.minimum(chunk.past, shape.reach(0.0)) * 2 * kv_heads * kv_bytes
    return np.asarray(chunk.num_sequences * np.asarray(shape.head_dim) * (new + cached))


def _flop_per_s(head_dim: FloatArray, gpu: GpuSpec, params: PrefillAttentionParams) -> FloatArray:
    known = sorted((float(name), value) for name, value in params.compute_efficiency.items())
    dims, efficiencies = zip(*known, strict=True)
    efficiency = np.interp(np.log2(head_dim), np.log2(dims), efficiencies)
    return np.asarray(efficiency * gpu.peak_flop_per_s(params.compute))


def _load(
    shape: AttentionHeads,
    heads: ArrayLike,
    num_sequences: FloatArray,
    kv_len: FloatArray,
    params: DecodeAttentionParams,
) -> _DecodeLoad:
    return _DecodeLoad(
        blocks=num_sequences * np.asarray(heads, np.float64),
        kv_len=kv_len,
        read_len=np.minimum(kv_len, shape.reach(params.window_padding_tokens)),
        row_bytes=2 * np.asarray(shape.head_dim, np.float64) * params.kv_bytes,
        cache_bytes=cache_bytes(shape, num_sequences, kv_len, params=params),
    )


def _decode_seconds(
    load: _DecodeLoad, *, gpu: GpuSpec, kernel: DecodeKernel, cache_cold: bool
) -> FloatArray:
    """Launch + merging of splits + blocks of work overlapped with memory traffic."""
    room = kernel.split_blocks_per_sm * gpu.num_sms / np.maximum(load.blocks, 1.0)
    splits = np.maximum(np.minimum(load.kv_len / kernel.split_tokens, room), 1.0)
    sm_bytes_per_s = kernel.sm_speed * gpu.hbm_bytes_per_s / gpu.num_sms
    block_s = kernel.block_s + load.read_len / splits * load.row_bytes / sm_bytes_per_s
    work_s = block_s * np.maximum(load.blocks * splits / gpu.num_sms, 1.0)
    cache_s = load.cache_bytes / (kernel.hbm_efficiency * gpu.hbm_bytes_per_s)
    if not cache_cold:
        in_l2 = 1 / (1 + (load.cache_bytes / (kernel.l2_share * gpu.l2_bytes)) ** 4)
        cache_s = cache_s * (1 - in_l2 + in_l2 / kernel.l2_speedup)
    merge_s = kernel.merge_s * (1 - 1 / splits)
    return np.asarray(kernel.launch_s + merge_s + p_norm(work_s, cache_s, kernel.norm))
