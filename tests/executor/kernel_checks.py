"""Every Triton kernel against torch, group by group.

`python -m tests.executor.kernel_checks cuda [GROUP ...]` checks on a GPU, in processes side by
side, and leaves the compiled kernels in Triton's cache; with `TRITON_INTERPRET=1` and `cpu` it
needs none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from executor.microbench.kernels.decode import Decode
from executor.microbench.kernels.elementwise import norm_residual, swiglu
from executor.microbench.kernels.int4 import Int4Gemm, dequantize
from executor.microbench.kv_caches import PLAIN_DTYPES, random_cache
from executor.microbench.packed_weights import pack_int4, unpacked
from executor.microbench.techniques import KV_BLOCK_SIZES, KV_FORMS

Check = Callable[[], None]

PROCESSES = 12
"""On a GPU, where compiling takes the time."""

SMALL_BLOCK_SIZES = (0, 16, 128)
"""Contiguous, pages below a tile and above: every branch of the kernel."""


def check_decode(
    form: tuple[str, str, int], kv_len: int, heads: tuple[int, int, int], device: str
) -> None:
    """Decode attention of the last two of three sequences."""
    torch.manual_seed(0)
    num_heads, kv_heads, dim = heads
    cache = random_cache(
        num_sequences=3, kv_len=kv_len, heads=(kv_heads, dim), form=form, device=device
    ).sequences(1, 3)
    dtype = getattr(torch, form[1]) if form[1] in PLAIN_DTYPES else torch.float16
    query = torch.randn(2, num_heads, dim, device=device, dtype=dtype)
    keys, values = (part.repeat_interleave(num_heads // kv_heads, 1) for part in cache.read())
    weights = query.float().unsqueeze(2) @ keys.transpose(2, 3) * dim**-0.5
    expected = (weights.softmax(-1) @ values).squeeze(2)
    assert_near(Decode(query, cache)(), expected, f"decode {form} {kv_len} {heads}")


def check_int4(m: int, shape: tuple[int, int], tiled: bool, device: str) -> None:
    """The fused GEMM, and dequantization by itself."""
    torch.manual_seed(0)
    x = torch.randn(m, shape[1], device=device, dtype=torch.float16)
    weight = pack_int4(torch.randn(shape, device=device), tiled=tiled)
    plain = unpacked(weight)
    out = torch.empty(shape, device=device, dtype=torch.float16)
    assert_near(dequantize(weight, out), plain, f"dequantize {shape} {tiled}")
    expected = x.double() @ plain.double().t()
    assert_near(Int4Gemm(x, weight)(), expected, f"int4 {m} {shape} {tiled}")


def check_norm(device: str) -> None:
    """Residual and norm; the residual is left as the sum."""
    x, residual = (torch.randn(5, 96, device=device) for _ in range(2))
    weight, added = torch.randn(96, device=device), x + residual
    expected = weight * added * torch.rsqrt(added.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_near(norm_residual(x, residual, weight, torch.empty_like(x)), expected, "norm")
    assert_near(residual, added, "residual")


def check_swiglu(device: str) -> None:
    """A width that is no multiple of a program's stretch."""
    gate_up = torch.randn(3, 2 * 1500, device=device)
    expected = torch.nn.functional.silu(gate_up[:, :1500]) * gate_up[:, 1500:]
    assert_near(swiglu(gate_up, torch.empty(3, 1500, device=device)), expected, "swiglu")


def kv_cache_checks(device: str) -> Iterator[Check]:
    """Every form that is timed, on a GPU; the branches of the kernels in the interpreter."""
    on_gpu = device == "cuda"
    # The interpreter multiplies no BF16; FP16 takes the same way.
    dtypes = {"bfloat16": "bfloat16" if on_gpu else "float16"}
    blocks = KV_BLOCK_SIZES if on_gpu else SMALL_BLOCK_SIZES
    heads = (32, 8, 128) if on_gpu else (4, 1, 32)
    for (dtype, layouts), block_size in product(KV_FORMS, blocks):
        # Layouts differ in strides alone: in the interpreter one dtype takes all of them.
        for layout in layouts if on_gpu or dtype == "bfloat16" else layouts[:1]:
            form = (layout, dtypes.get(dtype, dtype), block_size)
            yield partial(check_decode, form, 512 if on_gpu else 80, heads, device)
    # One token, a ragged end, and a KV head of its own for every query head.
    yield partial(check_decode, ("NHD", "float16", 32), 1, (4, 4, 64), device)
    yield partial(check_decode, ("HND", "fp8", 64), 77, (16, 1, 64), device)


def int4_checks(device: str) -> Iterator[Check]:
    """Few rows, which split K, and many."""
    sizes = (1, 4, 16, 64, 200) if device == "cuda" else (3, 70)
    shape = (1040, 1024) if device == "cuda" else (80, 256)
    for m, tiled in product(sizes, (True, False)):
        yield partial(check_int4, m, shape, tiled, device)


def elementwise_checks(device: str) -> Iterator[Check]:
    """Both chains."""
    yield partial(check_norm, device)
    yield partial(check_swiglu, device)


GROUPS: Mapping[str, Callable[[str], Iterator[Check]]] = {
    "kv_cache": kv_cache_checks,
    "int4_gemm": int4_checks,
    "elementwise": elementwise_checks,
}


def assert_near(found: Any, expected: Any, what: str) -> None:
    """Fail where any number is off by more than FP16 or BF16 arithmetic explains."""
    tolerance = 1e-2 if found.dtype == torch.bfloat16 else 2e-3
    error = float((found.double() - expected.double()).abs().max())
    allowed = tolerance * float(expected.double().abs().max().clamp(min=1.0))
    if not error <= allowed:
        raise AssertionError(f"{what}: off by {error:.3g}, allowed {allowed:.3g}")


def failures(groups: Iterable[str], device: str) -> dict[str, list[str]]:
    """Run groups and return what went wrong in each."""
    checks = [(group, check) for group in groups for check in GROUPS[group](device)]
    if device == "cpu":
        answers = [_failure(check) for _, check in checks]
    else:
        with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
            answers = list(pool.map(_failure, [check for _, check in checks]))
    found: dict[str, list[str]] = {group: [] for group, _ in checks}
    for (group, _), said in zip(checks, answers, strict=True):
        found[group] += [said] if said else []
    return found


def _failure(check: Check) -> str:
    try:
        check()
    except Exception as error:  # noqa: BLE001  one kernel must not hide the others
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    """Check the groups that are named, or all, and say which are right."""
    device, *groups = sys.argv[1:]
    found = failures(groups or GROUPS, device)
    for group, said in found.items():
        print(f"{group}: {'WRONG' if said else 'right'}")  # noqa: T201
        for line in said:
            print(f"  {line}")  # noqa: T201
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
