"""Rounds activations and cached keys and values as an engine's kernels would.

Each function returns what the kernel multiplies, in the precision that came in. Accumulation order
is not imitated: it differs between kernels too.
"""

from __future__ import annotations

from typing import Any

FP8_LARGEST = 448.0
"""Of E4M3."""

FP4_LARGEST = 6.0
"""Of E2M1."""

FP4_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""All magnitudes of E2M1."""

NVFP4_BLOCK = 16

FP8_GROUP = 128
"""Activations that share a scale beside weights in FP8 blocks (DeepSeek-V3, section 3.3)."""


def fp8(values: Any, scale: Any) -> Any:
    """Round to E4M3 at one scale."""
    return _e4m3(values.float() / scale).mul(scale).to(values.dtype)


def fp8_groups(values: Any) -> Any:
    """Round to E4M3, each 128 values of a token at a scale of their own."""
    groups = values.float().unflatten(-1, (-1, FP8_GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / FP8_LARGEST
    return (_e4m3(groups / scale) * scale).flatten(-2).to(values.dtype)


def int8_tokens(values: Any) -> Any:
    """Round to INT8, each token at a scale of its own."""
    return int8(values, values.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127)


def int8(values: Any, scale: Any) -> Any:
    """Round to INT8 at given scales."""
    return (values.float() / scale).round().clamp(-128, 127).mul(scale).to(values.dtype)


def nvfp4(values: Any, scale: Any) -> Any:
    """Round to NVFP4: blocks of 16 in E2M1, their scales in E4M3 over one scale of the tensor."""
    blocks = values.float().unflatten(-1, (-1, NVFP4_BLOCK))
    largest = blocks.abs().amax(dim=-1, keepdim=True) / FP4_LARGEST
    block_scale = _e4m3(largest / scale) * scale
    safe = block_scale.where(block_scale > 0, block_scale.new_ones(()))
    rounded = _e2m1(blocks / safe) * block_scale
    return rounded.flatten(-2).to(values.dtype)


def _e4m3(values: Any) -> Any:
    import torch  # noqa: PLC0415  optional

    return values.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).float()


def _e2m1(values: Any) -> Any:
    """Round to the nearest E2M1 value; of two, to the one with an even mantissa."""
    import torch  # noqa: PLC0415  optional

    size = values.abs().clamp(max=FP4_LARGEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, values)
