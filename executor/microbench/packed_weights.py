"""INT4 and INT8 weights as weight-only kernels read them: packed, in groups that share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUP = 128
"""Weights along K that share a scale, as AWQ and GPTQ checkpoints have it."""

INT4_MAX = 7
"""Symmetric: -7 to 7, stored with 8 added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """W[n, k] in INT4, two weights a byte."""

    data: Any
    """uint8 [k / GROUP, n, GROUP / 2]: byte j of a group holds weight j low, GROUP/2 + j high."""
    scales: Any
    """float16 [k / GROUP, n]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight, (n, k)."""
        groups, n, half = self.data.shape
        return int(n), int(groups * half * 2)


def pack_int4(weight: Any, *, tiled: bool = True) -> PackedWeight:
    """Return round-to-nearest INT4 of W[n, k].

    Args:
        weight: [n, k], k a multiple of `GROUP`.
        tiled: Whether the rows of a group of columns lie side by side, so that a tile of the
            GEMM is one stretch of memory; else a row lies in one piece, as in a checkpoint.
    """
    import torch  # noqa: PLC0415

    n, k = weight.shape
    grouped = weight.float().view(n, k // GROUP, GROUP)
    scales = (grouped.abs().amax(-1) / INT4_MAX).clamp(min=1e-6).to(torch.float16)
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-INT4_MAX, INT4_MAX) + 8
    low, high = codes.to(torch.uint8).chunk(2, -1)
    packed = (low | high << 4).transpose(0, 1)
    data = packed.contiguous() if tiled else packed.transpose(0, 1).contiguous().transpose(0, 1)
    return PackedWeight(data=data, scales=scales.t().contiguous())


def unpacked(weight: PackedWeight) -> Any:
    """Return W[n, k] as float32: the reference."""
    import torch  # noqa: PLC0415

    codes = torch.cat([weight.data & 0xF, weight.data >> 4], -1).float() - 8
    return (codes * weight.scales.float().unsqueeze(-1)).transpose(0, 1).flatten(1)
