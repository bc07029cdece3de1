"""What a configuration trades between throughput and speed, and where measured runs lie on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.validation.validate import Row, predict_run
from planner.workloads.measured import MeasuredRun

FEWEST_RUNS = 3
"""Measured runs from which a configuration gets a panel."""

MOST_FRONTS = 6

NUM_CLIENT_COUNTS = 16
"""Simulated points of a front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """One measured run."""

    clients: float
    speed: float
    """Output tokens/s of one user: 1 / mean TPOT."""
    throughput: float
    """Output tokens/s/GPU."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Front:
    """One configuration and one kind of request, over the number of clients."""

    title: str
    speed: NDArray[np.float64]
    throughput: NDArray[np.float64]
    measured: tuple[MeasuredPoint, ...]


def fronts_of(rows: Sequence[Row], *, calibration: str = "") -> list[Front]:
    """Return a front for each configuration with enough closed loops of equal requests."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        run, needed = row.run, {"tpot_ms.mean", "output_tok_per_s"}
        if run.protocol == "closed_loop" and needed <= set(row.scored()) and _is_fixed(run):
            lengths = (str(run.workload["isl"]), str(run.workload["osl"]))
            key = (run.gpu, run.engine, run.model, str(sorted(run.config.items())), *lengths)
            groups.setdefault(key, []).append(row)
    enough = [group for group in groups.values() if len(group) >= FEWEST_RUNS]
    largest = sorted(enough, key=len, reverse=True)[:MOST_FRONTS]
    return [_front([row.run for row in group], calibration) for group in largest]


def _is_fixed(run: MeasuredRun) -> bool:
    """Whether all requests of a run have the same lengths."""
    return run.workload.get("isl") is not None and run.workload.get("osl") is not None


def _front(runs: Sequence[MeasuredRun], calibration: str) -> Front:
    """Simulate the same requests with more and more clients, each sending as many as measured."""
    ordered = sorted(runs, key=lambda run: float(run.workload["concurrency"]))
    last = ordered[-1]
    isl, osl = last.workload["isl"], last.workload["osl"]
    most = float(last.workload["concurrency"])
    waves = max(last.load().num_requests / most, 2.0)
    speed, throughput = [], []
    for clients in np.unique(np.geomspace(1, 1.5 * most, NUM_CLIENT_COUNTS).round()):
        workload = {
            "protocol": "closed_loop", "isl": isl, "osl": osl, "concurrency": float(clients),
            "num_requests": round(waves * clients),
        }  # fmt: skip
        found = predict_run(replace(last, workload=workload), calibration=calibration).predicted
        speed.append(1e3 / found["tpot_ms.mean"])
        throughput.append(found["output_tok_per_s"] / last.num_gpus)
    precision = str(last.config.get("quantization", ""))
    return Front(
        title=f"{last.model} {precision}, {isl:g} in, {osl:g} out",
        speed=np.array(speed),
        throughput=np.array(throughput),
        measured=tuple(_point(run) for run in ordered),
    )


def _point(run: MeasuredRun) -> MeasuredPoint:
    return MeasuredPoint(
        clients=float(run.workload["concurrency"]),
        speed=1e3 / run.measured["tpot_ms.mean"],
        throughput=run.measured["output_tok_per_s"] / run.num_gpus,
    )
