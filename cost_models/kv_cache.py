"""Bytes that the KV cache takes for a token, a block and a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.engine import EngineConfig
from cost_models.model import AttentionKind, AttentionSpec, ModelSpec
from cost_models.precision import kv_dtype

FloatArray = NDArray[np.float64]


def kv_heads_per_rank(attention: AttentionSpec, attention_tp: int) -> int:
    """KV heads that one rank stores: at least one, so heads are replicated when TP exceeds them."""
    return -(-attention.num_kv_heads // attention_tp)


def layer_kv_bytes_per_token(
    attention: AttentionSpec, *, kv_cache_dtype: str, attention_tp: int = 1
) -> float:
    """Bytes that one layer caches for one token on one rank.

    GQA stores a key and a value per KV head; MLA stores one latent vector and one
    rotary key per token, replicated on every rank (DeepSeek-V2, section 2.1).
    """
    element_bytes = kv_dtype(kv_cache_dtype).bits / 8
    if attention.kind is AttentionKind.MLA:
        return (attention.kv_lora_rank + attention.qk_rope_head_dim) * element_bytes
    heads = kv_heads_per_rank(attention, attention_tp)
    return 2 * heads * attention.head_dim * element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPool:
    """Layers that share a window, and so a pool of blocks."""

    window_size: int
    """Tokens that these layers keep; 0 keeps all."""
    bytes_per_token: float
    """Bytes that these layers cache for one token on the rank that holds most."""

    def tokens_kept(self, seq_len: ArrayLike, tokens_per_block: ArrayLike) -> FloatArray:
        """Tokens of block space that a sequence occupies, its partly filled last block included.

        A sliding-window sequence holds the blocks that its window touches: the
        window itself and one block for its moving edge.
        """
        tokens = np.asarray(seq_len, dtype=np.float64)
        block = np.asarray(tokens_per_block, dtype=np.float64)
        if self.window_size:
            tokens = np.minimum(tokens, self.window_size + block)
        return np.ceil(tokens / block) * block


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """How a rank's KV cache is made up for one model and configuration."""

    pools: tuple[KvPool, ...]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token held by every layer."""
        return sum(pool.bytes_per_token for pool in self.pools)

    def sequence_bytes(self, seq_len: ArrayLike, tokens_per_block: ArrayLike) -> FloatArray:
        """Bytes that a sequence of `seq_len` tokens occupies in whole blocks."""
        total: FloatArray = np.zeros(())
        for pool in self.pools:
            total = total + pool.bytes_per_token * pool.tokens_kept(seq_len, tokens_per_block)
        return total

    def contiguous_bytes(self, max_seq_len: ArrayLike) -> FloatArray:
        """Bytes of a slot that reserves `max_seq_len` tokens in one piece, whatever is used."""
        return self.bytes_per_token * np.asarray(max_seq_len, dtype=np.float64)


def kv_layout(model: ModelSpec, config: EngineConfig) -> KvLayout:
    """Return the layout of the KV cache on the pipeline stage that holds most of it."""
    by_window: dict[int, float] = {}
    for group in model.layer_groups:
        layer_bytes = layer_kv_bytes_per_token(
            group.attention,
            kv_cache_dtype=config.kv_cache_dtype,
            attention_tp=config.attention_tensor_parallel_size,
        )
        window = group.attention.window_size
        by_window[window] = by_window.get(window, 0.0) + layer_bytes * group.count
    stage_share = -(-model.num_layers // config.pipeline_parallel_size) / model.num_layers
    pools = tuple(
        KvPool(window_size=window, bytes_per_token=total * stage_share)
        for window, total in sorted(by_window.items())
    )
    return KvLayout(pools=pools)


def joined(layouts: Iterable[KvLayout]) -> KvLayout:
    """Return the layout of models that cache the same sequences side by side."""
    by_window: dict[int, float] = {}
    for pool in (pool for layout in layouts for pool in layout.pools):
        window = pool.window_size
        by_window[window] = by_window.get(window, 0.0) + pool.bytes_per_token
    pools = (KvPool(window_size=w, bytes_per_token=b) for w, b in sorted(by_window.items()))
    return KvLayout(pools=tuple(pools))


def expected_block_waste(seq_len: ArrayLike, tokens_per_block: int) -> float:
    """Mean share of allocated block space that sequences of these lengths leave empty."""
    lengths = np.asarray(seq_len, dtype=np.float64)
    allocated = np.ceil(lengths / tokens_per_block) * tokens_per_block
    return float(1.0 - lengths.sum() / allocated.sum())
