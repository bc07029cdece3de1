"""Fits what an engine keeps on a GPU beside weights and cache, from the KV capacity it reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import Calibration
from cost_models.errors import PlannerError
from cost_models.memory import MemoryConstants
from planner.calibration.solver import solve
from planner.prediction.evaluator import Slice
from planner.prediction.predict import single
from planner.validation.validate import run_evaluator
from planner.workloads.measured import MeasuredRun

FloatArray = NDArray[np.float64]

REPORTED: Mapping[str, float] = {"kv_cache_tokens": 0.003, "cuda_graph_bytes_per_gpu": 0.1}
"""Metrics that an engine logs, and the error in log expected of the right constants."""

LOG_SD: Mapping[str, float] = {
    "runtime_bytes": 0.5,
    "activation_factor": 0.3,
    "graph_bytes_per_layer": 0.5,
}
"""Constants that runs can tell, and how far in log they may lie from what is shipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Memory constants, and how well they explain what was reported."""

    constants: MemoryConstants
    num_runs: int
    errors_pct: Mapping[str, tuple[float, float]]
    """Mean absolute error by metric, before and after."""

    def lines(self) -> list[str]:
        """Say what was fitted."""
        if not self.num_runs:
            return ["memory: no run states a KV capacity, the constants stay"]
        values = ", ".join(f"{name} = {getattr(self.constants, name):.4g}" for name in LOG_SD)
        errors = "; ".join(
            f"{name} {before:.2f} % -> {after:.2f} %"
            for name, (before, after) in self.errors_pct.items()
        )
        return [f"memory: {values}", f"memory of {self.num_runs} runs: {errors}"]


def fit_memory(runs: Sequence[MeasuredRun], calibration: Calibration) -> MemoryFit:
    """Return the memory constants nearest to what engines reported, held by the shipped ones.

    Args:
        runs: Of one engine; those that state no capacity, or pin it, are left out.
        calibration: What is shipped.
    """
    telling = [run for run in runs if _tells(run)]
    start = np.log([getattr(calibration.memory, name) for name in LOG_SD])
    log_sd = np.array(list(LOG_SD.values()))

    def at(z: FloatArray) -> MemoryConstants:
        values = np.exp(start + log_sd * z).tolist()
        return replace(calibration.memory, **dict(zip(LOG_SD, values, strict=True)))

    def misses(constants: MemoryConstants) -> list[tuple[str, float]]:
        changed = replace(calibration, memory=constants)
        return [miss for run in telling for miss in _misses(run, changed)]

    def residuals(z: FloatArray) -> FloatArray:
        return np.array([miss / REPORTED[name] for name, miss in misses(at(z))] + z.tolist())

    constants = calibration.memory
    if telling:
        constants = at(solve(residuals, np.zeros(log_sd.size)).x)
    before, after = misses(calibration.memory), misses(constants)
    return MemoryFit(
        constants=constants,
        num_runs=len(telling),
        errors_pct={
            name: (_mean_pct(before, name), _mean_pct(after, name))
            for name in REPORTED
            if any(own == name for own, _ in before)
        },
    )


def _tells(run: MeasuredRun) -> bool:
    if not run.measured.get("kv_cache_tokens"):
        return False
    try:
        return not run.engine_config().kv_cache_max_tokens
    except PlannerError:
        return False


def _misses(run: MeasuredRun, calibration: Calibration) -> list[tuple[str, float]]:
    """Log errors of what the engine reported."""
    evaluator, deployment = run_evaluator(run, calibration)
    plan = single(evaluator.memory(Slice(base=deployment)))
    found = []
    for name in REPORTED:
        predicted, measured = float(getattr(plan, name)), run.measured.get(name, 0.0)
        if predicted > 0 and measured > 0:
            found.append((name, math.log(predicted / measured)))
    return found


def _mean_pct(misses: Sequence[tuple[str, float]], name: str) -> float:
    return 100 * float(np.mean([abs(math.expm1(miss)) for own, miss in misses if own == name]))
