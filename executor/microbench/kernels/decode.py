"""Decode attention over a KV cache of any form: split-KV flash decoding, heads of a group packed.

One program reads one stretch of one KV head's cache once, for all query heads that share it; a
second kernel merges the stretches (Dao et al. 2023, "Flash-Decoding"). What the forms differ in
is where a token lies and how it becomes a number, the arithmetic is the same.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from executor.microbench.kv_caches import FP4_GROUP, KvCache

TILE_TOKENS = 64
"""Tokens that a program holds at a time, whatever the size of a page."""

CONTIGUOUS_STAGES = 3
"""Tiles in flight; the lookup of a page takes two more (one to load it, one to wait for it)."""

PROGRAMS_TARGET = 528
"""Programs that fill a large GPU: 132 multiprocessors, two waves of two."""

MOST_SPLITS = 64
"""Stretches that one program of the merge can hold."""

MIN_ROWS = 16
"""Smallest side of a matrix instruction."""


@triton.jit
def _places(
    table, sequence, tile, kv_len, table_width, page_stride, token_stride,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return where the tokens of a tile start, in elements, and which of them there are."""
    token = tile * TILE + tl.arange(0, TILE)
    known = token < kv_len
    if BLOCK == 0:
        at = sequence.to(tl.int64) * page_stride + token * token_stride
    elif BLOCK >= TILE:
        page = tl.load(table + sequence * table_width + tile // (BLOCK // TILE)).to(tl.int64)
        at = page * page_stride + (token % BLOCK) * token_stride
    else:
        lookup = table + sequence * table_width + token // BLOCK
        page = tl.load(lookup, mask=known, other=0).to(tl.int64)
        at = page * page_stride + (token % BLOCK) * token_stride
    return at, known


@triton.jit
def _weigh(score, highest, total):
    """Return the weights of a tile, the running maximum and sum, and what the past shrinks by."""
    new_highest = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - new_highest[:, None])
    keep = tl.exp2(highest - new_highest)
    return weight, new_highest, total * keep + tl.sum(weight, 1), keep


@triton.jit(do_not_specialize=["split_tiles", "table_width"])
def _decode(
    query, keys, values, table, partial, log_sum,
    score_scale, value_scale, kv_len, split_tiles, table_width, num_kv_heads,
    page_stride, head_stride, token_stride, dim_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, one KV head, one stretch; what is stored becomes q's dtype."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    head = (sequence * num_kv_heads + kv_head) * GROUP + row
    in_group = row < GROUP
    q = tl.load(query + head[:, None] * DIM + dim[None, :], mask=in_group[:, None], other=0.0)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, DIM], tl.float32)
    last = tl.minimum((split + 1) * split_tiles, tl.cdiv(kv_len, TILE))
    for tile in range(split * split_tiles, last):
        at, known = _places(
            table, sequence, tile, kv_len, table_width, page_stride, token_stride, BLOCK, TILE
        )
        at += kv_head * head_stride
        k = tl.load(keys + at[None, :] + dim[:, None] * dim_stride, mask=known[None, :], other=0.0)
        v = tl.load(
            values + at[:, None] + dim[None, :] * dim_stride, mask=known[:, None], other=0.0
        )
        score = tl.dot(q, k.to(q.dtype)) * score_scale
        score = tl.where(known[None, :], score, -1e30)
        weight, highest, total, keep = _weigh(score, highest, total)
        output = tl.dot(weight.to(q.dtype), v.to(q.dtype), output * keep[:, None])
    at = (head * tl.num_programs(2) + split).to(tl.int64)
    normed = output * (value_scale / total)[:, None]
    tl.store(partial + at[:, None] * DIM + dim[None, :], normed, mask=in_group[:, None])
    tl.store(log_sum + at, highest + tl.log2(total), mask=in_group)


@triton.jit
def _e2m1(code):
    """Return FP4 codes as FP16: sign and three bits into place, times 2 to the bias."""
    wide = code.to(tl.uint16)
    bits = ((wide & 8) << 12) | ((wide & 7) << 9)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def _scaled(
    codes, scale_at, known, HALF: tl.constexpr, PER_SCALE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return both halves of a tile of tokens as numbers: each scale is loaded once, then spread."""
    low_scale = tl.load(scale_at, mask=known[:, None], other=0.0).to(tl.float16)
    high_scale = tl.load(scale_at + HALF // PER_SCALE, mask=known[:, None], other=0.0).to(
        tl.float16
    )
    wide: tl.constexpr = [TILE, HALF // PER_SCALE, PER_SCALE]
    low_scale = tl.reshape(tl.broadcast_to(low_scale[:, :, None], wide), [TILE, HALF])
    high_scale = tl.reshape(tl.broadcast_to(high_scale[:, :, None], wide), [TILE, HALF])
    return _e2m1(codes & 0xF) * low_scale, _e2m1(codes >> 4) * high_scale


@triton.jit(do_not_specialize=["split_tiles", "table_width"])
def _decode_nvfp4(
    query, keys, values, key_scales, value_scales, table, partial, log_sum,
    score_scale, value_scale, kv_len, split_tiles, table_width, num_kv_heads,
    page_stride, head_stride, token_stride,
    scale_page_stride, scale_head_stride, scale_token_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, PER_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `_decode`, with two dims a byte: the low halves are the first half of a head's dims."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, dim = tl.arange(0, ROWS), tl.arange(0, HALF)
    head = (sequence * num_kv_heads + kv_head) * GROUP + row
    in_group = row < GROUP
    q_at = query + head[:, None] * 2 * HALF + dim[None, :]
    q_low = tl.load(q_at, mask=in_group[:, None], other=0.0)
    q_high = tl.load(q_at + HALF, mask=in_group[:, None], other=0.0)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low = tl.zeros([ROWS, HALF], tl.float32)
    high = tl.zeros([ROWS, HALF], tl.float32)
    group = tl.arange(0, HALF // PER_SCALE)
    last = tl.minimum((split + 1) * split_tiles, tl.cdiv(kv_len, TILE))
    for tile in range(split * split_tiles, last):
        at, known = _places(
            table, sequence, tile, kv_len, table_width, page_stride, token_stride, BLOCK, TILE
        )
        at += kv_head * head_stride
        scale_at, _ = _places(
            table, sequence, tile, kv_len, table_width, scale_page_stride, scale_token_stride,
            BLOCK, TILE,
        )  # fmt: skip
        scale_at += kv_head * scale_head_stride
        k = tl.load(keys + at[:, None] + dim[None, :], mask=known[:, None], other=0)
        scale_of = scale_at[:, None] + group[None, :]
        k_low, k_high = _scaled(k, key_scales + scale_of, known, HALF, PER_SCALE, TILE)
        score = tl.dot(q_low, tl.trans(k_low))
        score = tl.dot(q_high, tl.trans(k_high), score) * score_scale
        score = tl.where(known[None, :], score, -1e30)
        weight, highest, total, keep = _weigh(score, highest, total)
        v = tl.load(values + at[:, None] + dim[None, :], mask=known[:, None], other=0)
        v_low, v_high = _scaled(v, value_scales + scale_of, known, HALF, PER_SCALE, TILE)
        narrow = weight.to(tl.float16)
        low = tl.dot(narrow, v_low, low * keep[:, None])
        high = tl.dot(narrow, v_high, high * keep[:, None])
    at = (head * tl.num_programs(2) + split).to(tl.int64)
    norm = (value_scale / total)[:, None]
    out_at = partial + at[:, None] * 2 * HALF + dim[None, :]
    tl.store(out_at, low * norm, mask=in_group[:, None])
    tl.store(out_at + HALF, high * norm, mask=in_group[:, None])
    tl.store(log_sum + at, highest + tl.log2(total), mask=in_group)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits(partial, log_sum, out, num_splits, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One program: the stretches of one query head become its output."""
    head = tl.program_id(0)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM)
    known = split < num_splits
    logs = tl.load(log_sum + head * num_splits + split, mask=known, other=-1e30)
    weight = tl.exp2(logs - tl.max(logs, 0))
    at = (head * num_splits + split)[:, None] * DIM + dim[None, :]
    parts = tl.load(partial + at, mask=known[:, None], other=0.0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + head * DIM + dim, merged.to(out.dtype.element_ty))


class Decode:
    """Decode attention of a batch; buffers are made once, calls can be captured.

    Args:
        query: [sequences, heads, dim]; float16 where the cache is quantized.
        cache: Of as many sequences. NVFP4 in any layout but HDN.
    """

    def __init__(self, query: Any, cache: KvCache) -> None:
        self.query, self.cache = query, cache
        sequences, heads, dim = query.shape
        self.num_kv_heads = cache.keys.data.shape[1]
        self.tile = _tile_tokens(cache)
        tiles = -(-cache.kv_len // self.tile)
        wanted = -(-PROGRAMS_TARGET // (sequences * self.num_kv_heads))
        self.split_tiles = -(-tiles // min(wanted, tiles, MOST_SPLITS))
        self.num_splits = -(-tiles // self.split_tiles)
        shape = (sequences, heads, self.num_splits)
        self.partial = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
        self.log_sum = torch.empty(shape, dtype=torch.float32, device=query.device)
        self.out = torch.empty_like(query)

    def __call__(self) -> Any:
        """Return [sequences, heads, dim]."""
        sequences, heads, dim = self.query.shape
        launch = self._plain if self.cache.keys.group_scales is None else self._nvfp4
        launch((sequences, self.num_kv_heads, self.num_splits))
        _merge_splits[(sequences * heads,)](
            self.partial, self.log_sum, self.out, self.num_splits,
            DIM=dim, SPLITS=triton.next_power_of_2(self.num_splits),
        )  # fmt: skip
        return self.out

    def _plain(self, grid: tuple[int, ...]) -> None:
        keys, values = self.cache.keys.data, self.cache.values.data
        _decode[grid](
            self.query, keys, values, self._table, self.partial, self.log_sum,
            *self._numbers, *keys.stride(), DIM=self.cache.head_dim, **self._constants,
            num_warps=4, num_stages=self._num_stages,
        )  # fmt: skip

    def _nvfp4(self, grid: tuple[int, ...]) -> None:
        keys, values = self.cache.keys, self.cache.values
        _decode_nvfp4[grid](
            self.query, keys.data, values.data, keys.group_scales, values.group_scales,
            self._table, self.partial, self.log_sum, *self._numbers,
            *keys.data.stride()[:3], *keys.group_scales.stride()[:3],
            HALF=self.cache.head_dim // 2, PER_SCALE=FP4_GROUP, **self._constants,
            num_warps=4, num_stages=self._num_stages,
        )  # fmt: skip

    @property
    def _num_stages(self) -> int:
        return CONTIGUOUS_STAGES if self.cache.table is None else CONTIGUOUS_STAGES + 2

    @property
    def _table(self) -> Any:
        return self.log_sum if self.cache.table is None else self.cache.table

    @property
    def _numbers(self) -> tuple[float | int, ...]:
        scale = self.cache.keys.scale * self.cache.head_dim**-0.5 * math.log2(math.e)
        width = 0 if self.cache.table is None else self.cache.table.shape[1]
        return (
            scale, self.cache.values.scale, self.cache.kv_len, self.split_tiles, width,
            self.num_kv_heads,
        )  # fmt: skip

    @property
    def _constants(self) -> dict[str, int]:
        group = self.query.shape[1] // self.num_kv_heads
        rows = max(triton.next_power_of_2(group), MIN_ROWS)
        return {
            "GROUP": group, "ROWS": rows, "BLOCK": self.cache.block_size, "TILE": self.tile,
        }  # fmt: skip


def _tile_tokens(cache: KvCache) -> int:
    """Return the tokens of a tile: none reaches over a page in which tokens lie side by side.

    A wide access needs neighbours that are known to be such, and across pages nothing is.
    """
    side_by_side = cache.keys.data.stride(2) == 1
    page = cache.block_size if cache.table is not None and side_by_side else TILE_TOKENS
    return min(page, TILE_TOKENS)
