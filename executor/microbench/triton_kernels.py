"""Triton kernels: decode attention over a paged cache, and fused element-wise chains.

Imported only where Triton is installed: its decorator reads `tl` from the module's globals.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

NUM_SPLITS_TARGET = 512
"""Programs that keep every multiprocessor of a large GPU busy."""


@triton.jit
def _paged_decode(
    query, keys, values, table, partial, log_sum,
    scale, kv_len, num_kv_heads, blocks_per_sequence, split_blocks,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, one KV head, one split of its blocks (flash decoding)."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    row = tl.arange(0, GROUP_PADDED)
    column = tl.arange(0, DIM)
    token = tl.arange(0, BLOCK)
    head = kv_head * GROUP + row
    heads = num_kv_heads * GROUP
    in_group = row < GROUP
    q = tl.load(
        query + (sequence * heads + head)[:, None] * DIM + column[None, :],
        mask=in_group[:, None],
        other=0.0,
    )
    highest = tl.full([GROUP_PADDED], -1e30, tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    output = tl.zeros([GROUP_PADDED, DIM], tl.float32)
    last = tl.minimum((split + 1) * split_blocks, blocks_per_sequence)
    for number in range(split * split_blocks, last):
        block = tl.load(table + sequence * blocks_per_sequence + number).to(tl.int64)
        at = ((block * BLOCK + token) * num_kv_heads + kv_head)[:, None] * DIM + column[None, :]
        known = number * BLOCK + token < kv_len
        k = tl.load(keys + at, mask=known[:, None], other=0.0)
        v = tl.load(values + at, mask=known[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k)) * scale
        score = tl.where(known[None, :], score, -1e30)
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - new_highest[:, None])
        keep = tl.exp(highest - new_highest)
        total = total * keep + tl.sum(weight, 1)
        output = output * keep[:, None] + tl.dot(weight.to(v.dtype), v)
        highest = new_highest
    at = ((sequence * heads + head) * num_splits + split).to(tl.int64)
    normed = output / tl.maximum(total, 1e-30)[:, None]
    tl.store(partial + at[:, None] * DIM + column[None, :], normed, mask=in_group[:, None])
    tl.store(log_sum + at, highest + tl.log(tl.maximum(total, 1e-30)), mask=in_group)


@triton.jit
def _merge_splits(partial, log_sum, out, num_splits, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One program: the splits of one query head become its output."""
    head = tl.program_id(0)
    split, column = tl.arange(0, SPLITS), tl.arange(0, DIM)
    known = split < num_splits
    logs = tl.load(log_sum + head * num_splits + split, mask=known, other=-1e30)
    weight = tl.exp(logs - tl.max(logs, 0))
    at = (head * num_splits + split)[:, None] * DIM + column[None, :]
    parts = tl.load(partial + at, mask=known[:, None], other=0.0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + head * DIM + column, merged.to(out.dtype.element_ty))


@triton.jit
def _norm_residual(x, residual, weight, out, width, eps, WIDTH: tl.constexpr):
    """One program: one token; residual += x, then RMS norm of it."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    known = column < width
    at = row * width + column
    added = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    added += tl.load(residual + at, mask=known, other=0.0).to(tl.float32)
    tl.store(residual + at, added.to(residual.dtype.element_ty), mask=known)
    scale = 1.0 / tl.sqrt(tl.sum(added * added, 0) / width + eps)
    normed = added * scale * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=known)


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):
    """One program: a stretch of one token; silu(gate) * up."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=known, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=known, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=known)


class PagedDecode:
    """Decode attention of a batch over a paged cache; buffers are made once, calls are captured.

    Args:
        query: [batch, heads, dim].
        keys: [blocks, block_size, kv_heads, dim], as `values`.
        values: See keys.
        table: [batch, blocks a sequence], int32.
        kv_len: Tokens in the cache, the same for all sequences.
    """

    def __init__(self, query: Any, keys: Any, values: Any, *, table: Any, kv_len: int) -> None:
        self.query, self.keys, self.values, self.table = query, keys, values, table
        self.kv_len = kv_len
        batch, heads, dim = query.shape
        blocks = table.shape[1]
        wanted = -(-NUM_SPLITS_TARGET // (batch * keys.shape[2]))
        self.split_blocks = -(-blocks // min(wanted, blocks))
        self.num_splits = -(-blocks // self.split_blocks)
        shape = (batch, heads, self.num_splits)
        self.partial = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
        self.log_sum = torch.empty(shape, dtype=torch.float32, device=query.device)
        self.out = torch.empty_like(query)

    def __call__(self) -> Any:
        """Return [batch, heads, dim]."""
        batch, heads, dim = self.query.shape
        _, block_size, kv_heads, _ = self.keys.shape
        group = heads // kv_heads
        _paged_decode[(batch, kv_heads, self.num_splits)](
            self.query, self.keys, self.values, self.table, self.partial, self.log_sum,
            dim**-0.5, self.kv_len, kv_heads, self.table.shape[1], self.split_blocks,
            GROUP=group, GROUP_PADDED=max(triton.next_power_of_2(group), 16), DIM=dim,
            BLOCK=block_size,
        )  # fmt: skip
        _merge_splits[(batch * heads,)](
            self.partial, self.log_sum, self.out, self.num_splits,
            DIM=dim, SPLITS=triton.next_power_of_2(self.num_splits),
        )  # fmt: skip
        return self.out


def norm_residual(x: Any, residual: Any, weight: Any, out: Any) -> Any:
    """Add x to the residual in place and return the RMS norm of the sum."""
    tokens, width = x.shape
    _norm_residual[(tokens,)](
        x, residual, weight, out, width, 1e-5, WIDTH=triton.next_power_of_2(width)
    )
    return out


def swiglu(gate_up: Any, out: Any) -> Any:
    """Return silu(gate) * up of [tokens, 2 * width]."""
    tokens, width = out.shape
    _swiglu[(tokens, -(-width // 1024))](gate_up, out, width, BLOCK=1024)
    return out
