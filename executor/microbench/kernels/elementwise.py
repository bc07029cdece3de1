"""Triton kernels of fused element-wise chains: norm with residual, SwiGLU.

Imported only where Triton is installed: its decorator reads `tl` from the module's globals.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


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
