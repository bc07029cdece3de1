"""W4A16 kernels in FP16: a GEMM that dequantizes what it reads, and dequantization by itself."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from executor.microbench.packed_weights import GROUP, PackedWeight

PROGRAMS_TARGET = 1056
"""Programs that fill a large GPU: eight for each of 132 multiprocessors."""

LARGE_ROWS = 64
"""Rows of X above which arithmetic, not reading W, takes the time."""


UNPACK = tl.constexpr("""{
.reg .b32 even, odd, mask, ones, low_bias, sixteenth, high_bias;
mov.b32 ones, 0x64006400;
mov.b32 low_bias, 0x64086408;
mov.b32 sixteenth, 0x2c002c00;
mov.b32 high_bias, 0xd480d480;
prmt.b32 even, $4, 0, 0x4140;
prmt.b32 odd, $4, 0, 0x4342;
lop3.b32 $0, even, 0x000f000f, ones, 0xea;
lop3.b32 $1, odd, 0x000f000f, ones, 0xea;
lop3.b32 $2, even, 0x00f000f0, ones, 0xea;
lop3.b32 $3, odd, 0x00f000f0, ones, 0xea;
sub.f16x2 $0, $0, low_bias;
sub.f16x2 $1, $1, low_bias;
fma.rn.f16x2 $2, $2, sixteenth, high_bias;
fma.rn.f16x2 $3, $3, sixteenth, high_bias;
}""")
"""Four bytes become eight FP16 numbers in ten instructions.

Two bytes go into the halves of a register; a code in the mantissa of 1024 is 1024 + code, or 1024 +
16 code for the high one; what is subtracted then holds the bias of 8.
"""


@triton.jit
def _weights(codes, COMPILED: tl.constexpr):
    """Return the low and the high INT4 codes of bytes as FP16."""
    if COMPILED:
        low, high = tl.inline_asm_elementwise(
            UNPACK, "=r,=r,=r,=r,r", [codes], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low = (codes & 0xF).to(tl.float16) - 8.0
        high = (codes >> 4).to(tl.float16) - 8.0
    return low, high


@triton.jit(do_not_specialize=["m", "split_groups"])
def _int4_gemm(
    x, data, scales, out, m, n, k, split_groups, group_stride, row_stride,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, GROUP: tl.constexpr, COMPILED: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of Y = X Wᵀ over one stretch of K, in float32 or what Y is."""
    # Programs that follow each other share weights; X stays in the L2.
    row = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    column = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    split = tl.program_id(2)
    half = tl.arange(0, GROUP // 2)
    in_rows, in_columns = row < m, column < n
    x_at = x + row.to(tl.int64)[:, None] * k + half[None, :]
    w_at = data + column.to(tl.int64)[None, :] * row_stride + half[:, None]
    total = tl.zeros([M_TILE, N_TILE], tl.float32)
    last = tl.minimum((split + 1) * split_groups, k // GROUP)
    for group in range(split * split_groups, last):
        low_x = tl.load(x_at + group * GROUP, mask=in_rows[:, None], other=0.0)
        high_x = tl.load(x_at + group * GROUP + GROUP // 2, mask=in_rows[:, None], other=0.0)
        codes = tl.load(w_at + group * group_stride, mask=in_columns[None, :], other=0)
        scale = tl.load(scales + group * n + column, mask=in_columns, other=0.0)
        low, high = _weights(codes, COMPILED)
        if SCALE_SUMS:
            part = tl.dot(high_x, high, tl.dot(low_x, low))
            total += part * scale.to(tl.float32)[None, :]
        else:
            total = tl.dot(low_x, low * scale[None, :], total)
            total = tl.dot(high_x, high * scale[None, :], total)
    at = (split * m + row).to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _sum_splits(partial, out, size, num_splits, BLOCK: tl.constexpr):
    """One program: a stretch of Y, added up over the stretches of K."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(partial + split * size + at, mask=known, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=known)


@triton.jit
def _dequantize(data, scales, out, n, k, group_stride, row_stride, ROWS: tl.constexpr,
                GROUP: tl.constexpr, COMPILED: tl.constexpr):  # fmt: skip
    """One program: some rows of one group of columns."""
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, GROUP // 2)
    known = row < n
    codes = tl.load(
        data + group * group_stride + row.to(tl.int64)[:, None] * row_stride
        + half[None, :], mask=known[:, None], other=0,
    )  # fmt: skip
    scale = tl.load(scales + group * n + row, mask=known, other=0.0)[:, None]
    at = out + row.to(tl.int64)[:, None] * k + group * GROUP + half[None, :]
    low, high = _weights(codes, COMPILED)
    tl.store(at, low * scale, mask=known[:, None])
    tl.store(at + GROUP // 2, high * scale, mask=known[:, None])


class Int4Gemm:
    """Y[m, n] = X[m, k] Wᵀ with W dequantized in the kernel; few rows split K over programs.

    Args:
        x: float16 [m, k].
        weight: Of n rows and k columns.
    """

    def __init__(self, x: Any, weight: PackedWeight) -> None:
        self.x, self.weight = x, weight
        m, (n, k) = x.shape[0], weight.shape
        large = m > LARGE_ROWS
        self.tile = (128, 256) if large else (max(triton.next_power_of_2(m), 16), 64)
        # Few rows: scaling their sums is cheaper than scaling weights. Many: registers are short.
        self.options = {"SCALE_SUMS": not large, "num_warps": 8 if large else 4, "num_stages": 3}
        tiles, groups = -(-m // self.tile[0]) * -(-n // self.tile[1]), k // GROUP
        wanted = min(-(-PROGRAMS_TARGET // tiles), groups)
        self.split_groups = groups if large else -(-groups // wanted)
        self.num_splits = -(-groups // self.split_groups)
        self.out = torch.empty((m, n), dtype=x.dtype, device=x.device)
        self.partial = self.out
        if self.num_splits > 1:
            shape = (self.num_splits, m, n)
            self.partial = torch.empty(shape, dtype=torch.float32, device=x.device)

    def __call__(self) -> Any:
        """Return [m, n]."""
        m, (n, k), data = self.x.shape[0], self.weight.shape, self.weight.data
        grid = (triton.cdiv(m, self.tile[0]), triton.cdiv(n, self.tile[1]), self.num_splits)
        _int4_gemm[grid](
            self.x, data, self.weight.scales, self.partial, m, n, k, self.split_groups,
            data.stride(0), data.stride(1), M_TILE=self.tile[0], N_TILE=self.tile[1],
            GROUP=GROUP, COMPILED=_is_compiled(data), **self.options,
        )  # fmt: skip
        if self.num_splits > 1:
            size = m * n
            _sum_splits[(triton.cdiv(size, 1024),)](
                self.partial, self.out, size, self.num_splits, BLOCK=1024
            )
        return self.out


def dequantize(weight: PackedWeight, out: Any) -> Any:
    """Write W[n, k] as float16 into `out`, to be multiplied by an ordinary GEMM."""
    (n, k), data = weight.shape, weight.data
    _dequantize[(triton.cdiv(n, 64), k // GROUP)](
        data,
        weight.scales,
        out,
        n,
        k,
        data.stride(0),
        data.stride(1),
        ROWS=64,
        GROUP=GROUP,
        COMPILED=_is_compiled(data),
    )
    return out


def _is_compiled(data: Any) -> bool:
    """Return whether a GPU runs it; Triton's interpreter knows no instructions."""
    return bool(data.is_cuda)
