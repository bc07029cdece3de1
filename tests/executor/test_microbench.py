"""Micro-benchmarks: what is timed first, that kernels compute what they should, and the tables."""

from __future__ import annotations

import os
import signal
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
from executor.microbench.collectives import RankGroup, RankGroups
from executor.microbench.points import Abilities, Point, Schedule, Speed, calibration_points
from executor.microbench.run import CPU_SPEED, FAMILIES, MAKERS, microbench, write_tables
from executor.microbench.techniques import TECHNIQUES, technique_points
from planner.validation.operators import validate_operators

ROOT = Path(__file__).parents[2]

GPU_SPEED = Speed(flop_per_s=2e14, bytes_per_s=1e12, memory_bytes=8e10, longest_call_s=0.2)

TWO_GPUS = Abilities(dtypes=("bfloat16", "fp8"), triton=True, num_gpus=2)
POINTS = calibration_points(TWO_GPUS)
TECHNIQUE_POINTS = technique_points(TWO_GPUS, tuple(TECHNIQUES))


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


def test_every_family_has_points_and_a_way_to_time_them() -> None:
    assert {p.family for p in [*POINTS, *TECHNIQUE_POINTS]} == set(FAMILIES)
    assert set(MAKERS) == set(FAMILIES) - {"nccl"}


def test_technique_points_are_distinct_and_worth_their_time() -> None:
    keys = {(p.family, tuple(sorted(p.key.items()))) for p in TECHNIQUE_POINTS}
    assert len(keys) == len(TECHNIQUE_POINTS)
    assert all(GPU_SPEED.allows(p) for p in TECHNIQUE_POINTS)
    cost_s = sum(GPU_SPEED.cost_s(p) for p in TECHNIQUE_POINTS)
    assert cost_s < 120.0


def test_a_narrow_cache_moves_fewer_bytes() -> None:
    moved = {
        str(p.key["kv_cache_dtype"]): p.bytes_moved
        for p in TECHNIQUE_POINTS
        if p.family == "kv_cache" and p.key["batch_size"] == 64
    }
    assert moved["bfloat16"] == 64 * 4096 * 8 * 128 * 2 * 2
    assert moved["fp8"] == moved["int8"] == moved["bfloat16"] / 2
    assert moved["nvfp4"] == moved["bfloat16"] * 4.5 / 16


def test_techniques_run_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = microbench(
        system="h100_sxm", time_budget_s=2.0, device="cpu", families=("kv_append", "elementwise")
    )
    assert result.failures == ()
    names = {path.name for path in write_tables(result, tmp_path)}
    assert names == {"kv_append.csv", "elementwise.csv"}
    rows = [row for row in result.rows if row["family"] == "kv_append"]
    fastest = min(rows, key=lambda row: row["latency_us"])
    assert fastest["form"] != "concatenated"
    assert all(row["bytes_moved"] > 0 and row["bytes_per_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("families", "message"),
    [(("kv_cach",), "'kv_cach' is unknown"), (("kv_cache", "nccl"), "nothing of kv_cache, nccl")],
)
def test_families_that_cannot_be_timed_are_an_error(
    families: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("torch")
    with pytest.raises(MeasurementError, match=message):
        microbench(system="h100_sxm", time_budget_s=1.0, device="cpu", families=families)


def test_two_processes_reduce_together_until_one_ends() -> None:
    """Over Gloo; each rank checks the sum of what all brought before anything is timed."""
    pytest.importorskip("torch")
    with RankGroup(2, "cpu") as group:
        pids = group.pids
        group.start()
        small_s, large_s = group.allreduce_s(1 << 10), group.allreduce_s(1 << 22)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RuntimeError):
            group.allreduce_s(1 << 10, limit_s=5.0)
        with pytest.raises(RuntimeError):  # at once: a broken group is asked nothing
            group.allreduce_s(1 << 10, limit_s=1000.0)
    assert 0 < small_s < large_s < 5.0
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


CHECKS = [sys.executable, "-m", "tests.executor.kernel_checks", "cpu"]


def test_triton_kernels_compute_what_torch_does() -> None:
    """In Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    result = subprocess.run(
        CHECKS,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["kv_cache:", "right", "int4_gemm:", "right", "elementwise:",
                                     "right"]  # fmt: skip


@pytest.mark.gpu
def test_compiled_kernels_compute_what_torch_does() -> None:
    result = subprocess.run([*CHECKS[:-1], "cuda"], cwd=ROOT, check=False)
    assert result.returncode == 0


def test_every_group_of_ranks_is_ended_even_where_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []

    class Group:
        def __init__(self, num_ranks: int, _device: str) -> None:
            self.num_ranks = num_ranks

        def __enter__(self) -> Group:
            return self

        def __exit__(self, *_: object) -> None:
            ended.append(self.num_ranks)
            if self.num_ranks == 4:
                raise OSError("a rank does not end")

        def start(self) -> None:
            """Every rank answers."""

        def allreduce_s(self, elements: int) -> float:
            return float(elements)

    monkeypatch.setattr("executor.microbench.collectives.RankGroup", Group)
    with pytest.raises(OSError, match="a rank does not end"), RankGroups("cpu") as groups:
        assert groups.allreduce_s(2, 10) == groups.allreduce_s(4, 10) == groups.allreduce_s(2, 10)
    assert sorted(ended) == [2, 4]
