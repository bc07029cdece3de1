"""Points that tell what an optimization is worth: KV-cache form, INT4, alignment, fusion.

They calibrate nothing; `tests/bench/technique_tables.py` turns their tables into percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from cost_models.fusion import ELEMENT_BYTES, swiglu_traffic, unfused_score_traffic
from cost_models.precision import kv_dtype
from executor.microbench.points import Abilities, Point, elementwise_points, gemm_point

KV_HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
"""A layer of Llama-3.1-8B."""

KV_LOADS: Sequence[tuple[int, int]] = ((1, 16384), (256, 256), (64, 4096))
"""(sequences, cached tokens): one long, many short, a full server. All exceed an L2."""

KV_FORMS: Sequence[tuple[str, Sequence[str]]] = (
    ("bfloat16", ("NHD", "HND", "HDN")), ("fp8", ("NHD", "HND", "HDN")),
    ("int8", ("NHD", "HND", "HDN")), ("nvfp4", ("NHD", "HND")),
)  # fmt: skip
"""Layouts by dtype; NVFP4's scales are grouped along a head's elements, which HDN tears apart."""

KV_BLOCK_SIZES = (0, 16, 32, 64, 128, 256)
"""Tokens of a page; 0 is a contiguous cache."""

APPEND_FORMS = ("preallocated", "paged", "concatenated")

INT4_SHAPES: Sequence[tuple[int, int]] = ((28672, 4096), (4096, 14336), (10240, 8192))
"""(n, k); a few copies of the smallest exceed an L2 in INT4 as well."""

INT4_FORMS: Mapping[str, float] = {
    "half": 2.0, "int4": 0.516, "int4_rows": 0.516, "int4_unfused": 4.516,
}  # fmt: skip
"""Bytes moved by weight: INT4 has its scales with it; unfused writes FP16 and reads it again."""

ALIGNED, PAST_ALIGNED = 4096, (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""A side of a GEMM that suits every tile, and how far beyond it the odd ones are."""

FP8_MULTIPLE = 16
"""Sides of an FP8 GEMM that cuBLAS takes at all."""

ATTENTION_FORMS = ("unfused", "math", "efficient", "flash", "cudnn")

ATTENTION_LOADS: Sequence[tuple[int, int, int]] = (
    (1, 512, 512), (1, 2048, 2048), (8, 1024, 1024), (1, 4096, 4096), (64, 1, 2048),
)  # fmt: skip
"""(sequences, queries, keys): prompts, and a decode step."""

MLP_SIZES = (4096, 14336)
"""Hidden and intermediate size of a layer of Llama-3.1-8B."""


def technique_points(abilities: Abilities, families: Sequence[str]) -> list[Point]:
    """Return the points of some technique families that a device can time."""
    return [point for name in families for point in TECHNIQUES[name](abilities)]


def _kv_cache(abilities: Abilities) -> Iterator[Point]:
    """Decode attention over caches that differ in form alone."""
    if not abilities.triton:
        return
    heads = KV_HEADS
    for (dtype, layouts), (batch, length) in product(KV_FORMS, KV_LOADS):
        tokens = batch * length
        elements = 2.0 * tokens * heads["num_kv_heads"] * heads["head_dim"]
        stored = elements * _kv_bits(dtype) / 8
        for layout, block_size in product(layouts, KV_BLOCK_SIZES):
            yield Point(
                family="kv_cache",
                key={**heads, "batch_size": batch, "kv_len": length, "kv_cache_dtype": dtype,
                     "layout": layout, "block_size": block_size},
                flop=4.0 * tokens * heads["num_heads"] * heads["head_dim"],
                bytes_moved=stored,
                # Numbers are made in float32 before they are stored.
                allocated_bytes=6.0 * elements,
            )  # fmt: skip


def _kv_append(_: Abilities) -> Iterator[Point]:
    """Storing one new token of each sequence, in place or by making the cache anew."""
    heads, dim = KV_HEADS["num_kv_heads"], KV_HEADS["head_dim"]
    for form, (batch, length) in product(APPEND_FORMS, ((1, 1024), (16, 1024), (64, 4096))):
        token_bytes = 2.0 * batch * heads * dim * ELEMENT_BYTES
        yield Point(
            family="kv_append",
            key={"form": form, "batch_size": batch, "kv_len": length,
                 "num_kv_heads": heads, "head_dim": dim},
            bytes_moved=2 * token_bytes * (length + 1 if form == "concatenated" else 1),
            allocated_bytes=3 * token_bytes * length,
        )  # fmt: skip


def _int4_gemm(abilities: Abilities) -> Iterator[Point]:
    """W4A16 beside FP16: one kernel, and dequantization by itself before an ordinary GEMM."""
    if not abilities.triton:
        return
    for form, (n, k), m in product(INT4_FORMS, INT4_SHAPES, (1, 4, 16, 64, 256, 2048)):
        yield Point(
            family="int4_gemm",
            key={"form": form, "m": m, "n": n, "k": k},
            flop=2.0 * m * n * k,
            bytes_moved=n * k * INT4_FORMS[form] + ELEMENT_BYTES * m * (n + k),
            # The FP16 weight that is packed, its codes in float32 and some copies.
            allocated_bytes=20.0 * n * k,
        )


def _alignment(abilities: Abilities) -> Iterator[Point]:
    """GEMMs whose N or K is a little beyond what suits every tile."""
    for dtype, m, past in product(abilities.dtypes, (16, 2048), PAST_ALIGNED):
        if dtype == "fp8" and past % FP8_MULTIPLE:
            continue
        yield gemm_point("alignment", dtype, (m, ALIGNED + past, ALIGNED))
        if past:
            yield gemm_point("alignment", dtype, (m, ALIGNED, ALIGNED + past))


def _fused_attention(abilities: Abilities) -> Iterator[Point]:
    """Attention by operators one by one, and by each of torch's kernels."""
    heads, dim = KV_HEADS["num_heads"], KV_HEADS["head_dim"]
    forms = ATTENTION_FORMS if abilities.num_gpus else ATTENTION_FORMS[:2]
    for form, (batch, queries, keys) in product(forms, ATTENTION_LOADS):
        moved = ELEMENT_BYTES * 2.0 * batch * heads * dim * (queries + keys)
        scores = float(unfused_score_traffic(batch * heads, queries, keys).bytes_moved)
        one_by_one = form in ("unfused", "math")
        yield Point(
            family="fused_attention",
            key={"form": form, "batch_size": batch, "query_len": queries, "kv_len": keys,
                 "num_heads": heads, "head_dim": dim},
            flop=4.0 * batch * heads * queries * keys * dim,
            bytes_moved=moved + (scores if one_by_one else 0.0),
            allocated_bytes=moved + 2 * scores,
        )  # fmt: skip


def _fused_mlp(abilities: Abilities) -> Iterator[Point]:
    """A SwiGLU layer: gate, up, activation, product and down, or gate with up and one kernel."""
    hidden, inter = MLP_SIZES
    forms = ("unfused", "fused") if abilities.triton else ("unfused",)
    for form, tokens in product(forms, (1, 16, 128, 1024, 8192)):
        weights = 3.0 * hidden * inter * ELEMENT_BYTES
        chain = float(swiglu_traffic(tokens, inter, fused=form == "fused").bytes_moved)
        yield Point(
            family="fused_mlp",
            key={"form": form, "num_tokens": tokens, "hidden_size": hidden, "inter_size": inter},
            flop=6.0 * tokens * hidden * inter,
            bytes_moved=weights + chain,
            allocated_bytes=2 * weights + 4 * chain,
        )


def _kv_bits(dtype: str) -> float:
    return kv_dtype("bf16" if dtype == "bfloat16" else dtype).bits


TECHNIQUES: Mapping[str, Callable[[Abilities], Iterator[Point]]] = {
    "kv_cache": _kv_cache,
    "kv_append": _kv_append,
    "int4_gemm": _int4_gemm,
    "alignment": _alignment,
    "fused_attention": _fused_attention,
    "fused_mlp": _fused_mlp,
    "elementwise": lambda abilities: elementwise_points(fused=abilities.triton),
}
"""Families by name, each with what a device can time of it."""
