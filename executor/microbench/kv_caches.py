"""KV caches in every form that is compared: contiguous or paged, by layout and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

LAYOUTS: Mapping[str, tuple[int, int, int, int]] = {
    "NHD": (0, 2, 1, 3),
    "HND": (0, 1, 2, 3),
    "HDN": (0, 1, 3, 2),
}
"""Order in memory of (page, head, token, dim); each order is its own inverse.

HDN stores a head as [dim, tokens]: consecutive tokens lie side by side.
"""

PLAIN_DTYPES = ("bfloat16", "float16")
"""Stored as they are computed with."""

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1 by code (OCP Microscaling Formats 1.0, table 5)."""

FP4_GROUP = 16
"""Elements of NVFP4 that share an FP8 scale."""

FP8_MAX, INT8_MAX, FP4_MAX = 448.0, 127.0, 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Keys or values of all pages in one dtype, indexed [page, head, token, dim].

    The index order is the same for every layout, the strides are not.
    """

    data: Any
    """NVFP4: bytes, dim i in the low half of byte i and dim i + dim/2 in the high half."""
    scale: float = 1.0
    """What a stored number is multiplied by."""
    group_scales: Any = None
    """NVFP4: one FP8 scale for 16 dims, indexed like the data."""

    def pages(self, first: int, last: int) -> Stored:
        """Return some pages, without a copy."""
        groups = None if self.group_scales is None else self.group_scales[first:last]
        return replace(self, data=self.data[first:last], group_scales=groups)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, scales included."""
        parts = (self.data,) if self.group_scales is None else (self.data, self.group_scales)
        return sum(part.numel() * part.element_size() for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """Keys and values of a batch. A contiguous cache has one page a sequence and no table."""

    keys: Stored
    values: Stored
    kv_len: int
    table: Any = None
    """Page of each block of each sequence, int32."""

    @property
    def block_size(self) -> int:
        """Tokens of a page; 0 for a contiguous cache."""
        return 0 if self.table is None else int(self.keys.data.shape[2])

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return int(self.keys.data.shape[3]) * (1 if self.keys.group_scales is None else 2)

    def sequences(self, first: int, last: int) -> KvCache:
        """Return the cache of some of the sequences, without a copy."""
        if self.table is not None:
            return replace(self, table=self.table[first:last])
        keys, values = self.keys.pages(first, last), self.values.pages(first, last)
        return replace(self, keys=keys, values=values)

    def read(self) -> tuple[Any, Any]:
        """Return keys and values as float32 [sequence, head, token, dim]: the reference."""
        return self._gathered(self.keys), self._gathered(self.values)

    def _gathered(self, stored: Stored) -> Any:
        plain = dequantized(stored)
        if self.table is not None:
            plain = plain[self.table.long()].transpose(1, 2).flatten(2, 3)
        return plain[:, :, : self.kv_len]


def random_cache(
    *,
    num_sequences: int,
    kv_len: int,
    heads: tuple[int, int],
    form: tuple[str, str, int],
    device: str,
) -> KvCache:
    """Return a cache of random numbers; pages lie in no order.

    Args:
        num_sequences: Sequences, each of `kv_len` tokens.
        kv_len: Tokens of each.
        heads: KV heads and elements of a head.
        form: Layout, dtype, and tokens of a page (0: contiguous).
        device: Where it lies.
    """
    import torch  # noqa: PLC0415

    layout, dtype, block_size = form
    blocks = -(-kv_len // block_size) if block_size else 1
    shape = (num_sequences * blocks, heads[0], block_size or kv_len, heads[1])
    keys, values = (
        quantized(torch.randn(shape, device=device, dtype=torch.bfloat16), dtype, layout)
        for _ in range(2)
    )
    table = None
    if block_size:
        pages = torch.randperm(shape[0], device=device).to(torch.int32)
        table = pages.view(num_sequences, blocks)
    return KvCache(keys=keys, values=values, kv_len=kv_len, table=table)


def quantized(plain: Any, dtype: str, layout: str) -> Stored:
    """Return numbers as a cache stores them: one scale a tensor, NVFP4 in groups too."""
    import torch  # noqa: PLC0415

    if dtype in PLAIN_DTYPES:
        return Stored(data=_laid_out(plain.to(getattr(torch, dtype)), layout))
    highest = float(plain.abs().max())
    if dtype == "nvfp4":
        return _nvfp4(plain, highest / (FP4_MAX * FP8_MAX), layout)
    if dtype == "fp8":
        scale = highest / FP8_MAX
        data = (plain.float() / scale).to(torch.float8_e4m3fn)
    else:
        scale = highest / INT8_MAX
        data = (plain.float() / scale).round().to(torch.int8)
    return Stored(data=_laid_out(data, layout), scale=scale)


def dequantized(stored: Stored) -> Any:
    """Return the stored numbers as float32."""
    import torch  # noqa: PLC0415

    if stored.group_scales is None:
        return stored.data.float() * stored.scale
    codes = torch.cat([stored.data & 0xF, stored.data >> 4], -1).long()
    magnitudes = torch.tensor(FP4_VALUES, device=codes.device)[codes & 7]
    signed = torch.where(codes >= 8, -magnitudes, magnitudes)
    return signed * stored.group_scales.float().repeat_interleave(FP4_GROUP, -1) * stored.scale


def _nvfp4(plain: Any, scale: float, layout: str) -> Stored:
    import torch  # noqa: PLC0415

    grouped = plain.float().unflatten(-1, (-1, FP4_GROUP)) / scale
    group_scales = (grouped.abs().amax(-1) / FP4_MAX).to(torch.float8_e4m3fn)
    ratio = (grouped / group_scales.float().clamp(min=1e-9).unsqueeze(-1)).flatten(-2)
    steps = torch.tensor(FP4_VALUES, device=plain.device)
    codes = torch.bucketize(ratio.abs(), (steps[1:] + steps[:-1]) / 2, out_int32=True)
    codes = (codes + 8 * (ratio < 0)).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return Stored(
        data=_laid_out(low | high << 4, layout),
        scale=scale,
        group_scales=_laid_out(group_scales, layout),
    )


def _laid_out(tensor: Any, layout: str) -> Any:
    order = LAYOUTS[layout]
    return tensor.permute(order).contiguous().permute(order)
