"""Turns a point of calibration into something that can be called, its inputs allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

Work = Callable[[], Any]
"""One call of a kernel on inputs that are ready."""

MOST_WEIGHT_COPIES = 5
"""As in the collector of the published tables: weights below a fifth of the L2 stay in it."""

DEFAULT_L2_BYTES = 32 << 20


def gemm_work(key: dict[str, Any], device: str) -> Work:
    """Y[m, n] = X[m, k] W[n, k]ᵀ, with as many copies of W as it takes to leave the cache."""
    import torch  # noqa: PLC0415

    m, n, k = key["m"], key["n"], key["k"]
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weight_bytes = n * k * (1 if key["dtype"] == "fp8" else 2)
    copies = min(MOST_WEIGHT_COPIES, -(-l2_bytes(device) // weight_bytes))
    weights = cycle([torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(copies)])
    if key["dtype"] != "fp8":
        return lambda: torch.nn.functional.linear(x, next(weights))
    scale = torch.ones((), device=device)
    narrow = x.to(torch.float8_e4m3fn)
    narrow_weights = cycle([next(weights).to(torch.float8_e4m3fn).t() for _ in range(copies)])
    return lambda: torch._scaled_mm(
        narrow, next(narrow_weights), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
    )


def _prefill(key: dict[str, Any], device: str) -> Work:
    """Causal attention over a batch of prompts."""
    import torch  # noqa: PLC0415

    shape = (key["batch_size"], key["num_heads"], key["seq_len"], key["head_dim"])
    query = torch.randn(shape, device=device, dtype=torch.bfloat16)
    keys, values = _contiguous(key, key["seq_len"], device)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, enable_gqa=True
    )


def _decode_contiguous(key: dict[str, Any], device: str) -> Work:
    """One new token a sequence over a cache without blocks."""
    import torch  # noqa: PLC0415

    shape = (key["batch_size"], key["num_heads"], 1, key["head_dim"])
    query = torch.randn(shape, device=device, dtype=torch.bfloat16)
    keys, values = _contiguous(key, key["kv_len"], device)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, enable_gqa=True
    )


def _decode_paged(key: dict[str, Any], device: str) -> Work:
    """One new token a sequence over blocks that lie anywhere in the cache."""
    import torch  # noqa: PLC0415

    from executor.microbench.kernels.decode import Decode  # noqa: PLC0415
    from executor.microbench.kv_caches import random_cache  # noqa: PLC0415

    shape = (key["batch_size"], key["num_heads"], key["head_dim"])
    cache = random_cache(
        num_sequences=key["batch_size"],
        kv_len=key["kv_len"],
        heads=(key["num_kv_heads"], key["head_dim"]),
        form=("NHD", key["kv_cache_dtype"], key["block_size"]),
        device=device,
    )
    # FP8 becomes FP16 in one instruction, BF16 in two.
    query_dtype = torch.float16 if key["kv_cache_dtype"] == "fp8" else torch.bfloat16
    return Decode(torch.randn(shape, device=device, dtype=query_dtype), cache)


def _elementwise(key: dict[str, Any], device: str) -> Work:
    """Norm with residual, or SwiGLU; as one kernel, or as torch's operators one by one."""
    makers = {"norm_residual": _norm_residual, "swiglu": _swiglu}
    return makers[key["op"]](key, device)


def _norm_residual(key: dict[str, Any], device: str) -> Work:
    import torch  # noqa: PLC0415

    shape = (key["num_tokens"], key["width"])
    x, residual, out = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    weight = torch.ones(key["width"], device=device, dtype=torch.bfloat16)
    if key["form"] == "fused":
        from executor.microbench.kernels.elementwise import norm_residual  # noqa: PLC0415

        return lambda: norm_residual(x, residual, weight, out)

    def unfused() -> Any:
        added = (x + residual).float()
        scale = torch.rsqrt(added.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * (added * scale).to(torch.bfloat16)

    return unfused


def _swiglu(key: dict[str, Any], device: str) -> Work:
    import torch  # noqa: PLC0415

    tokens, width = key["num_tokens"], key["width"]
    gate_up = torch.randn(tokens, 2 * width, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, width, device=device, dtype=torch.bfloat16)
    if key["form"] == "fused":
        from executor.microbench.kernels.elementwise import swiglu  # noqa: PLC0415

        return lambda: swiglu(gate_up, out)
    # By themselves the two projections write tensors of their own.
    gate, up = (part.contiguous() for part in gate_up.split(width, dim=-1))
    return lambda: torch.nn.functional.silu(gate) * up


def _bandwidth(key: dict[str, Any], device: str) -> Work:
    import torch  # noqa: PLC0415

    source = torch.ones(key["num_bytes"] // 4, device=device, dtype=torch.float32)
    if key["op"] == "read":
        read: Work = source.sum
        return read
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _launch(key: dict[str, Any], device: str) -> Work:
    """Kernels that do next to nothing: what is left is the cost of launching them."""
    import torch  # noqa: PLC0415

    x = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(key["num_kernels"]):
            x.add_(1.0)

    return launch


def _contiguous(key: dict[str, Any], length: int, device: str) -> tuple[Any, Any]:
    import torch  # noqa: PLC0415

    shape = (key["batch_size"], key["num_kv_heads"], length, key["head_dim"])
    keys = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return keys, torch.randn(shape, device=device, dtype=torch.bfloat16)


def l2_bytes(device: str) -> int:
    """Return the size of the cache that inputs must exceed to be read from memory."""
    import torch  # noqa: PLC0415

    if device == "cpu":
        return DEFAULT_L2_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", DEFAULT_L2_BYTES))


OPERATORS: Mapping[str, Callable[[dict[str, Any], str], Work]] = {
    "gemm": gemm_work,
    "attention_context": _prefill,
    "attention_decode": _decode_paged,
    "attention_decode_contiguous": _decode_contiguous,
    "elementwise": _elementwise,
    "bandwidth": _bandwidth,
    "launch": _launch,
}
