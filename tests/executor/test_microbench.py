"""Micro-benchmarks: what is timed first, that kernels compute what they should, and the tables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.errors import MeasurementError
from cost_models.tables import read_table
from executor.microbench.points import Point, Schedule, Speed, all_points
from executor.microbench.run import CPU_SPEED, microbench, write_tables
from planner.validation.operators import validate_operators

ROOT = Path(__file__).parents[2]

GPU_SPEED = Speed(flop_per_s=2e14, bytes_per_s=1e12, memory_bytes=8e10, longest_call_s=0.2)

POINTS = all_points(dtypes=("bfloat16", "fp8"), num_gpus=2, paged=True)


def spread(points: list[Point]) -> float:
    """Mean distance of every point of the family from the nearest of those that were timed."""
    family = [p for p in POINTS if p.family == points[0].family and GPU_SPEED.allows(p)]
    return sum(min(p.distance(q) for q in points) for p in family) / len(family)


def test_every_allowed_point_comes_once() -> None:
    given_out = list(Schedule(points=POINTS, speed=GPU_SPEED))
    assert len(given_out) == len({id(p) for p in given_out})
    assert Counter(p.family for p in given_out) == Counter(
        p.family for p in POINTS if GPU_SPEED.allows(p)
    )


def test_a_budget_covers_every_family_and_spreads_over_each() -> None:
    total_s, chosen = 0.0, []
    for point in Schedule(points=POINTS, speed=GPU_SPEED):
        total_s += GPU_SPEED.cost_s(point)
        if total_s > 15.0:
            break
        chosen.append(point)
    families = Counter(p.family for p in chosen)
    assert set(families) == {p.family for p in POINTS}
    assert min(families.values()) >= 6
    gemm = [p for p in chosen if p.family == "gemm"]
    in_order = [p for p in POINTS if p.family == "gemm"][: len(gemm)]
    assert spread(gemm) < spread(in_order)


@given(st.sampled_from(POINTS), st.sampled_from(POINTS))
def test_distance_is_symmetric_and_zero_only_to_itself(one: Point, other: Point) -> None:
    if one.family == other.family:
        assert one.distance(other) == other.distance(one)
        assert (one.distance(other) == 0) == (one.key == other.key)


def test_a_cpu_is_spared_large_points() -> None:
    allowed = [p for p in POINTS if CPU_SPEED.allows(p)]
    assert 0 < len(allowed) < len(POINTS)
    assert all(CPU_SPEED.call_s(p) < 0.05 for p in islice(Schedule(POINTS, CPU_SPEED), 50))


def test_a_cpu_run_writes_tables_that_the_planner_reads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    said: list[str] = []
    result = microbench(
        system="h100_sxm",
        time_budget_s=3.0,
        device="cpu",
        progress=lambda what, _: said.append(what),
    )
    assert result.failures == ()
    assert len(result.rows) == len(said) <= result.num_points
    assert all(row["latency_us"] > 0 for row in result.rows)
    written = {path.name for path in write_tables(result, tmp_path)}
    assert {"gemm.csv", "attention_context.csv", "bandwidth.csv", "operators.csv"} <= written
    assert set(read_table(tmp_path / "gemm.csv")) >= {"system", "dtype", "m", "n", "k"}
    errors = {(e.family, e.dtype): e.n for e in validate_operators(tmp_path / "operators.csv")}
    assert errors[("gemm", "bfloat16")] == sum(row["family"] == "gemm" for row in result.rows)
    assert ("attention_prefill", "bfloat16") in errors


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MeasurementError, match="no CUDA device"):
        microbench(system="h100_sxm", time_budget_s=1.0, device="cuda")


KERNELS = """
import torch
from executor.microbench.triton_kernels import PagedDecode, norm_residual, swiglu

torch.manual_seed(0)
for batch, heads, kv_heads, dim, kv_len, block in ((2, 8, 2, 64, 100, 16), (1, 4, 4, 64, 1, 32),
                                                   (3, 16, 1, 128, 257, 64)):
    blocks = -(-kv_len // block)
    query = torch.randn(batch, heads, dim)
    keys, values = (torch.randn(batch * blocks, block, kv_heads, dim) for _ in range(2))
    table = torch.randperm(batch * blocks).to(torch.int32).view(batch, blocks)
    out = PagedDecode(query, keys, values, table=table, kv_len=kv_len)()
    for sequence in range(batch):
        k, v = (cache[table[sequence].long()].flatten(0, 1)[:kv_len].transpose(0, 1)
                for cache in (keys, values))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[sequence][None, :, None], k[None], v[None], enable_gqa=True)
        torch.testing.assert_close(out[sequence], expected[0, :, 0], rtol=1e-3, atol=1e-3)

x, residual, weight = torch.randn(5, 96), torch.randn(5, 96), torch.randn(96)
added = x + residual
expected = weight * added * torch.rsqrt(added.pow(2).mean(-1, keepdim=True) + 1e-5)
torch.testing.assert_close(norm_residual(x, residual, weight, torch.empty(5, 96)), expected)
torch.testing.assert_close(residual, added)

gate_up = torch.randn(3, 2 * 1500)
expected = torch.nn.functional.silu(gate_up[:, :1500]) * gate_up[:, 1500:]
torch.testing.assert_close(swiglu(gate_up, torch.empty(3, 1500)), expected)
"""


def test_triton_kernels_compute_what_torch_does() -> None:
    """In Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", KERNELS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
