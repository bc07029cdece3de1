"""Memory constants from the KV capacity that engines report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cost_models.calibration import Calibration
from cost_models.profile_io import load_gpu
from engines.registry import load_calibration
from planner.calibration.memory import fit_memory
from planner.calibration.solver import solve
from planner.prediction.evaluator import Slice
from planner.prediction.predict import single
from planner.validation.validate import run_evaluator
from planner.workloads.measured import MeasuredRun, read_runs

RUNS = Path(__file__).parents[3] / "profiles" / "runs" / "h200_vllm" / "runs.jsonl"


@pytest.fixture(scope="module")
def shipped() -> Calibration:
    return load_calibration(load_gpu("h200"), "vllm")


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    return [run for run, _, _ in read_runs(RUNS) if run is not None]


def reported_with(run: MeasuredRun, calibration: Calibration) -> MeasuredRun:
    """The run as an engine with these memory constants would report it."""
    evaluator, deployment = run_evaluator(run, calibration)
    plan = single(evaluator.memory(Slice(base=deployment)))
    reported = {
        "kv_cache_tokens": float(plan.kv_cache_tokens),
        "cuda_graph_bytes_per_gpu": float(plan.cuda_graph_bytes_per_gpu),
    }
    return replace(run, measured={**run.measured, **reported})


def test_constants_that_made_the_reports_are_found(
    runs: list[MeasuredRun], shipped: Calibration
) -> None:
    truth = replace(shipped.memory, runtime_bytes=1.5e9, graph_bytes_per_layer=6e5)
    reports = [reported_with(run, replace(shipped, memory=truth)) for run in runs]
    fit = fit_memory(reports, shipped)
    assert fit.constants.runtime_bytes == pytest.approx(1.5e9, rel=0.15)
    assert fit.constants.graph_bytes_per_layer == pytest.approx(6e5, rel=0.02)
    before, after = fit.errors_pct["kv_cache_tokens"]
    assert after < 0.1 < before


def test_measured_capacities_are_met(runs: list[MeasuredRun], shipped: Calibration) -> None:
    before, after = fit_memory(runs, shipped).errors_pct["kv_cache_tokens"]
    assert after <= before < 1.0


def test_runs_that_tell_nothing_leave_the_constants(
    runs: list[MeasuredRun], shipped: Calibration
) -> None:
    silent = [replace(run, measured={"tpot_ms.mean": 5.0}) for run in runs[:3]]
    pinned = [replace(run, config={**run.config, "kv_cache_max_tokens": 5000}) for run in runs[:3]]
    for left_out in (silent, pinned, []):
        fit = fit_memory(left_out, shipped)
        assert fit.constants == shipped.memory
        assert fit.lines() == ["memory: no run states a KV capacity, the constants stay"]


def test_the_solver_sees_across_steps() -> None:
    """A function of whole blocks: its derivative is 0 almost everywhere."""
    found = solve(lambda z: np.array([np.floor(100 * z[0]) / 100 - 0.7]), np.zeros(1))
    assert found.x[0] == pytest.approx(0.7, abs=0.02)
