"""Turns a technique's point into something that can be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

from executor.microbench.operators import Work, gemm_work, l2_bytes
from executor.microbench.timing import CALLS_PER_SAMPLE


def _kv_cache(key: dict[str, Any], device: str) -> Work:
    """Decode attention over as many caches as it takes to leave the L2, as layers follow layers."""
    import torch  # noqa: PLC0415

    from executor.microbench.kernels.decode import Decode  # noqa: PLC0415
    from executor.microbench.kv_caches import PLAIN_DTYPES, random_cache  # noqa: PLC0415

    batch, kv_heads, dim = key["batch_size"], key["num_kv_heads"], key["head_dim"]
    # Sized by BF16, so that every dtype reads as many different caches.
    copies = _cold_copies(4 * batch * kv_heads * dim * key["kv_len"], device)
    cache = random_cache(
        num_sequences=copies * batch,
        kv_len=key["kv_len"],
        heads=(kv_heads, dim),
        form=(key["layout"], key["kv_cache_dtype"], key["block_size"]),
        device=device,
    )
    plain = key["kv_cache_dtype"] in PLAIN_DTYPES
    query_dtype = torch.bfloat16 if plain else torch.float16
    query = torch.randn((batch, key["num_heads"], dim), device=device, dtype=query_dtype)
    layers = cycle(
        [Decode(query, cache.sequences(i * batch, (i + 1) * batch)) for i in range(copies)]
    )
    return lambda: next(layers)()  # noqa: PLW0108  another one each time


def _kv_append(key: dict[str, Any], device: str) -> Work:
    """One new key and value of every sequence."""
    import torch  # noqa: PLC0415

    batch, length, heads = key["batch_size"], key["kv_len"], key["num_kv_heads"]
    shape = (batch, heads, length, key["head_dim"])
    cache = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
    token = torch.randn((batch, heads, 1, key["head_dim"]), device=device, dtype=torch.bfloat16)
    last = torch.tensor([length - 1], device=device)
    slots = torch.randperm(batch * length, device=device)[:batch]

    def preallocated() -> None:
        for kept in cache:
            kept.index_copy_(2, last, token)

    def paged() -> None:
        for kept in cache:
            kept.view(-1, heads, key["head_dim"]).index_copy_(0, slots, token.squeeze(2))

    def concatenated() -> list[Any]:
        return [torch.cat([kept, token], 2) for kept in cache]

    forms = {"preallocated": preallocated, "paged": paged, "concatenated": concatenated}
    return forms[key["form"]]


def _int4_gemm(key: dict[str, Any], device: str) -> Work:
    """Y = X Wᵀ with W in INT4 or FP16, from as many weights as it takes to leave the cache."""
    import torch  # noqa: PLC0415

    from executor.microbench.kernels.int4 import Int4Gemm, dequantize  # noqa: PLC0415
    from executor.microbench.packed_weights import pack_int4  # noqa: PLC0415

    m, n, k, form = key["m"], key["n"], key["k"], key["form"]
    half = torch.float16
    x = torch.randn(m, k, device=device, dtype=half)
    copies = _cold_copies(n * k // 2, device)
    plain = (torch.randn(n, k, device=device, dtype=half) for _ in range(copies))
    if form == "half":
        ready = cycle(list(plain))
        return lambda: torch.nn.functional.linear(x, next(ready))
    weights = [pack_int4(weight, tiled=form != "int4_rows") for weight in plain]
    if form == "int4_unfused":
        packed, out = cycle(weights), torch.empty(n, k, device=device, dtype=half)
        return lambda: torch.nn.functional.linear(x, dequantize(next(packed), out))
    gemms = cycle([Int4Gemm(x, weight) for weight in weights])
    return lambda: next(gemms)()  # noqa: PLW0108  another one each time


def _fused_attention(key: dict[str, Any], device: str) -> Work:
    """Attention of prompts (causal) or of one query a sequence, by one of torch's ways."""
    import torch  # noqa: PLC0415
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415

    batch, heads, dim = key["batch_size"], key["num_heads"], key["head_dim"]
    queries, keys = key["query_len"], key["kv_len"]
    q, k, v = (
        torch.randn((batch, heads, length, dim), device=device, dtype=torch.bfloat16)
        for length in (queries, keys, keys)
    )
    if key["form"] == "unfused":
        return _unfused_attention(q, k, v)
    backend = {
        "math": SDPBackend.MATH,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }[key["form"]]

    def fused() -> Any:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)

    return fused


def _unfused_attention(q: Any, k: Any, v: Any) -> Work:
    """The same by operators one by one, scores in BF16 through memory."""
    import torch  # noqa: PLC0415

    queries, keys = q.shape[2], k.shape[2]
    mask = torch.full((queries, keys), float("-inf"), device=q.device, dtype=q.dtype).triu(1)

    def unfused() -> Any:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        if queries > 1:
            scores = scores + mask
        return scores.softmax(-1) @ v

    return unfused


def _fused_mlp(key: dict[str, Any], device: str) -> Work:
    """A SwiGLU layer; its weights alone exceed an L2."""
    import torch  # noqa: PLC0415

    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    tokens, hidden, inter = key["num_tokens"], key["hidden_size"], key["inter_size"]
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    gate_up = torch.randn(2 * inter, hidden, device=device, dtype=torch.bfloat16)
    down = torch.randn(hidden, inter, device=device, dtype=torch.bfloat16)
    if key["form"] == "unfused":
        gate, up = gate_up.chunk(2)
        return lambda: linear(silu(linear(x, gate)) * linear(x, up), down)
    from executor.microbench.kernels.elementwise import swiglu  # noqa: PLC0415

    product = torch.empty(tokens, inter, device=device, dtype=torch.bfloat16)
    return lambda: linear(swiglu(linear(x, gate_up), product), down)


def _cold_copies(num_bytes: int, device: str) -> int:
    """Return how many inputs of a size take turns, so that none is still in the L2."""
    return min(CALLS_PER_SAMPLE, -(-3 * l2_bytes(device) // num_bytes))


TECHNIQUE_OPERATORS: Mapping[str, Callable[[dict[str, Any], str], Work]] = {
    "kv_cache": _kv_cache,
    "kv_append": _kv_append,
    "int4_gemm": _int4_gemm,
    "alignment": gemm_work,
    "fused_attention": _fused_attention,
    "fused_mlp": _fused_mlp,
}
