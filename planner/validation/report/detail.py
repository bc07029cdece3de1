"""Single runs looked at closely: predicted again, with all that a summary leaves out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.errors import ProfileError
from planner.prediction.predict import Prediction, predict_deployment
from planner.simulator.timeline import Timeline, timeline
from planner.validation.validate import Row, run_calibration, run_evaluator
from planner.workloads.demand import run_demand
from planner.workloads.measured import MeasuredRun

FloatArray = NDArray[np.float64]

LATENCIES = ("ttft_ms", "tpot_ms", "e2el_ms")
"""Latencies of single requests."""

COLUMNS = ("ttft_ms", "e2el_ms", "osl")
"""What a requests file says of each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detail:
    """One run, simulated again."""

    row: Row
    prediction: Prediction

    def shares_of(self, metric: str) -> Mapping[str, float]:
        """Return the share of each operator family in the time behind a metric, above 0.

        First tokens and the longest gaps come from steps with prompts; everything else from all
        steps of the simulated run.
        """
        with_prompts = metric.startswith("ttft_ms") or metric == "itl_ms.p99"
        breakdown = self.prediction.step_time_breakdown["mixed"]
        seconds = breakdown if with_prompts else self.prediction.time_by_operator
        total = sum(seconds.values())
        return {family: s / total for family, s in seconds.items() if s > 0}

    @property
    def timeline(self) -> Timeline | None:
        """The engine over time; None where nothing was simulated."""
        simulation = self.prediction.simulation
        return timeline(simulation) if simulation else None

    def predicted_latencies(self) -> dict[str, FloatArray]:
        """Return TTFT, TPOT and E2E latency (ms) of every simulated request."""
        simulation = self.prediction.simulation
        if simulation is None:
            return {}
        times = simulation.times
        return _latencies(1e3 * times.ttft_s, 1e3 * times.e2el_s, times.osl)


def detail_of(row: Row, *, calibration: str = "") -> Detail:
    """Predict a run again and keep everything."""
    evaluator, deployment = run_evaluator(row.run, run_calibration(row.run, calibration))
    demand = None if row.run.protocol == "capacity" else run_demand(row.run, evaluator.load)
    return Detail(row=row, prediction=predict_deployment(evaluator, deployment, demand))


def measured_latencies(run: MeasuredRun) -> dict[str, FloatArray]:
    """Return TTFT, TPOT and E2E latency (ms) of every measured request; empty without its file.

    Raises:
        ProfileError: The file is damaged.
    """
    if "requests_file" not in run.workload:
        return {}
    path = run.folder / str(run.workload["requests_file"])
    try:
        rows = [json.loads(line) for line in _text(path).splitlines() if line.strip()]
        rows = [row for row in rows if row.get("e2el_ms") is not None]
        if not rows:
            return {}
        columns = [np.array([float(row[name]) for row in rows]) for name in COLUMNS]
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: not a requests file ({error!r})") from None
    return _latencies(*columns)


def _latencies(
    ttft_ms: FloatArray, e2el_ms: FloatArray, osl: NDArray[Any]
) -> dict[str, FloatArray]:
    tokens = np.asarray(osl, dtype=np.float64)
    many = tokens > 1
    tpot_ms = (e2el_ms[many] - ttft_ms[many]) / (tokens[many] - 1)
    return dict(zip(LATENCIES, (ttft_ms, tpot_ms, e2el_ms), strict=True))


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
