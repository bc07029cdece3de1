"""Fits an engine's constants on measured runs: first its steps, then whole runs, simulated.

Where a run kept its requests, the times of their tokens tell the engine's steps, and with them
most constants, without a simulation. What is left (the front end, and how far launches are hidden)
is fitted on the metrics of whole runs.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import Calibration
from cost_models.profile_io import load_gpu
from engines.registry import engine_constants
from planner.calibration.constants import (
    CONSTANTS,
    LAUNCHES,
    Constant,
    Part,
    fitted_constants,
    with_constants,
)
from planner.calibration.solver import shared_apart, solve_costly
from planner.calibration.steps import RUN_LOG_SD, SeenRun, StepFit, fit_steps
from planner.calibration.unknowns import Slopes, Unknowns
from planner.own_calibrations import own_operators
from planner.validation.validate import FRONT_END_LIMITED, calibration_from, outcome_of_run
from planner.workloads.measured import MeasuredRun

FloatArray = NDArray[np.float64]

METRIC_LOG_SD: Mapping[str, float] = {
    "tpot_ms.mean": 0.02,
    "itl_ms.p50": 0.02,
    "output_tok_per_s": 0.02,
    "e2el_ms.p50": 0.03,
    "e2el_ms.p99": 0.06,
    "ttft_ms.mean": 0.1,
    "itl_ms.p99": 0.1,
    "ttft_ms.p99": 0.15,
}
"""Error that is expected even of the right constants, by metric that is fitted."""

OPEN_LOOP_ONLY = frozenset({"ttft_ms.p99"})
"""Metrics that hang on the phase of the waves in a closed loop."""

LARGEST_LOG_ERROR = 0.6
"""Error at which a metric stops pulling: some runs contain waits that no step explains."""

MOST_RUNS = 96
"""Runs on which constants are fitted; of more, those are taken that differ most."""

STEPS = 4
"""Steps of the fit on whole runs."""

FROM_STEPS_LOG_SD = (2.0, 0.05)
"""How far whole runs may move what the steps tell: so many of its standard errors, and at least."""

FEWEST_GROUPS = 3
"""Groups of runs without which leaving one out says nothing of the spread."""

NOT_TOLD = 0.9
"""Standard error, as a share of the prior's, from which runs count as silent on a constant."""

FLAGGED_WEIGHT = 0.3
"""Weight of a run's misses when something else than engine and GPU may have set its times."""

WEIGHED_DOWN = frozenset(
    {"client_limited", "throttled", "shared_gpu", "stalled", "cached_prompts", "token_mask"}
)
"""Flags that do so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Constants fitted on runs, and how well the runs tell them."""

    values: Mapping[str, float]
    relative_errors: Mapping[str, float]
    """Standard error of each as a share of it."""
    not_told: tuple[str, ...]
    """Constants of which the runs say next to nothing: they stay near their prior."""

    def with_jackknife(self, without: Sequence[Mapping[str, float]]) -> Fit:
        """Return the same with the jackknife's standard errors where these are larger.

        The linearised errors see how the residuals bend, not that a simulated run jumps when a
        wave falls apart; leaving groups out sees both (Efron and Stein 1981).

        Args:
            without: Constants fitted with each group of runs left out.
        """
        if len(without) < FEWEST_GROUPS:
            return self
        groups = np.log([[values[name] for name in self.values] for values in without])
        spread = np.sqrt((len(without) - 1) * groups.var(axis=0))
        errors = dict(zip(self.values, spread.tolist(), strict=True))
        larger = {name: max(errors[name], self.relative_errors[name]) for name in self.values}
        return replace(self, relative_errors=larger)

    def lines(self) -> list[str]:
        """Say each constant with its error, and which the runs cannot tell."""
        lines = [
            f"{name} = {value:.4g} +- {100 * self.relative_errors[name]:.0f} %"
            + (" (not told by these runs)" if name in self.not_told else "")
            for name, value in self.values.items()
        ]
        if self.not_told:
            lines.append(
                "What tells more: runs with a large batch, prompts of many lengths, an open loop, "
                "and the precisions and parallel sizes that are wanted."
            )
        return lines


def fit_constants(
    runs: Sequence[MeasuredRun], *, priors: Mapping[str, Constant] | None = None
) -> Fit:
    """Return the constants nearest to the runs, held by a prior where runs say nothing.

    Args:
        runs: Of one engine.
        priors: By constant; round figures where none are given.
    """
    with Fitter(runs, priors=priors) as fitter:
        return fitter.whole()


class Fitter:
    """Fits constants on runs, and on what is left when some are left out.

    Reading the steps of runs and simulating each with every constant moved is what takes time. Both
    are done once: a part is fitted from the slopes of the whole, and by its own runs' misses alone.

    Args:
        runs: Of one engine.
        priors: By constant; round figures where none are given.
    """

    def __init__(
        self, runs: Sequence[MeasuredRun], *, priors: Mapping[str, Constant] | None = None
    ) -> None:
        self.runs = tuple(runs)
        self.table = priors or fitted_constants(engine_constants(runs[0].engine))
        self.seconds: dict[str, float] = {}
        """Wall time by stage."""
        with self._timed("reading the steps of runs"):
            self._seen = seen_runs(self.runs)
        self._simulated = frozenset(most_different_rows(self.runs, MOST_RUNS))
        self._workers = _Workers(self.runs)
        self._steps: StepFit | None = None
        self._slopes: Slopes | None = None
        self._shared: Mapping[int, FloatArray] = {}

    def __enter__(self) -> Fitter:
        """Return itself; processes start with the first simulation."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self._workers.close()

    def whole(self) -> Fit:
        """Fit on all runs."""
        with self._timed("fitting steps"):
            self._steps = fit_steps([run for run in self._seen if run is not None], self.table)
        with self._timed("fitting whole runs"):
            return self._fit(self._steps, range(len(self.runs)))

    def without(self, left_out: Collection[int]) -> Fit:
        """Fit on all runs but some, named by their number; after `whole`."""
        rows = [row for row in range(len(self.runs)) if row not in left_out]
        with self._timed("fitting with runs left out"):
            seen = [run for row in rows if (run := self._seen[row]) is not None]
            return self._fit(fit_steps(seen, self.table, whole=self._steps), rows)

    def _fit(self, steps: StepFit, rows: Sequence[int]) -> Fit:
        """Fit what steps do not tell on whole runs."""
        rows = [row for row in rows if row in self._simulated]
        unknowns = Unknowns.of(_left_to_runs(self.table, steps))
        start = np.zeros(len(unknowns.names))

        def missed(z: FloatArray) -> list[FloatArray]:
            found = self._workers.misses({**steps.values, **unknowns.values(z)}, rows)
            return self._apart(found, rows)

        at_start = {**steps.values, **unknowns.values(start)}
        found = self._workers.misses(at_start, rows)
        if self._slopes is None:
            self._shared = self._measured_shared(at_start, found, rows)
        base = self._apart(found, rows)
        if self._slopes is None:
            self._slopes = self._measured_slopes(steps, unknowns, base, rows)
        keys = [str(row) for row in rows]
        fit = solve_costly(
            lambda z: np.concatenate([*missed(z), z]),
            start,
            bounds=unknowns.bounds,
            steps=STEPS,
            jac=self._slopes.jacobian(unknowns, keys, base),
        )
        errors = {**steps.log_sds, **unknowns.relative_errors(fit.jac)}
        values = {**steps.values, **unknowns.values(fit.x)}
        return Fit(
            values={name: values[name] for name in self.table},
            relative_errors={name: errors[name] for name in self.table},
            not_told=tuple(
                name for name, c in self.table.items() if errors[name] > NOT_TOLD * c.log_sd
            ),
        )

    def _apart(self, found: Sequence[FloatArray], rows: Sequence[int]) -> list[FloatArray]:
        """Return the misses of runs, apart from what moves all metrics of a run together."""
        return [
            shared_apart(missed, self._shared[row]) for row, missed in zip(rows, found, strict=True)
        ]

    def _measured_shared(
        self, values: Mapping[str, float], base: Sequence[FloatArray], rows: Sequence[int]
    ) -> dict[int, FloatArray]:
        """Return by how much runs' misses under these constants move on a slower machine.

        It is a deviation slower; near capacity they move by many times that, so such a run tells
        less of a step.
        """
        slower = self._workers.misses(values, rows, slower=math.exp(RUN_LOG_SD))
        return {
            row: (after - before)[:, None]
            for row, after, before in zip(rows, slower, base, strict=True)
        }

    def _measured_slopes(
        self,
        steps: StepFit,
        unknowns: Unknowns,
        base: Sequence[FloatArray],
        rows: Sequence[int],
    ) -> Slopes:
        start = np.zeros(len(unknowns.names))

        def moved(z: FloatArray, name: str) -> list[FloatArray]:
            """Simulate the runs that a constant may reach; the others stay where they were."""
            reached = [row for row in rows if self._may_reach(name, row)]
            values = {**steps.values, **unknowns.values(z)}
            misses = self._apart(self._workers.misses(values, reached), reached)
            found = dict(zip(reached, misses, strict=True))
            return [found.get(row, own) for row, own in zip(rows, base, strict=True)]

        return Slopes.measured(
            moved, unknowns, run_ids=[str(row) for row in rows], start=start, base=base
        )

    def _may_reach(self, name: str, row: int) -> bool:
        """Whether a constant may change a run: none of a step does that changes no step seen."""
        of_step = CONSTANTS[name].part is not Part.FRONT_END and name not in LAUNCHES
        return not of_step or self._seen[row] is None

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started_s = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started_s


def seen_runs(runs: Sequence[MeasuredRun]) -> list[SeenRun | None]:
    """Return the steps that each run shows; None where it kept no requests."""
    return [SeenRun.of(run, calibrated(run, {})) for run in runs]


def _left_to_runs(table: Mapping[str, Constant], steps: StepFit) -> dict[str, Constant]:
    """Return what steps do not tell, and around what they say of launches, how far these hide."""
    times, least = FROM_STEPS_LOG_SD
    left = {name: c for name, c in table.items() if name not in steps.values}
    for name in LAUNCHES:
        if name in steps.values:
            sd = min(max(times * steps.log_sds[name], least), table[name].log_sd)
            left[name] = replace(table[name], prior=steps.values[name], log_sd=sd)
    return left


class _Workers:
    """Processes that predict runs: all cores work, and none outlives a task.

    Each process has runs of its own, so that it keeps the step costs that a change of other
    constants leaves as they were.

    Args:
        runs: What is predicted; sent to the processes once.
    """

    def __init__(self, runs: Sequence[MeasuredRun]) -> None:
        count = min(len(runs), os.cpu_count() or 1)
        self._pools = [
            ProcessPoolExecutor(
                1,
                mp_context=get_context("spawn"),
                initializer=_receive_runs,
                initargs=(list(runs[share::count]),),
            )
            for share in range(count)
        ]

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def misses(
        self, values: Mapping[str, float], rows: Sequence[int], *, slower: float = 1.0
    ) -> list[FloatArray]:
        """Return the misses of some runs, named by their number, under these constants.

        Args:
            values: Constants.
            rows: Numbers of the runs.
            slower: Times as long as they say that the machine takes.
        """
        count = len(self._pools)
        tasks = [
            self._pools[row % count].submit(_misses_of_task, row // count, dict(values), slower)
            for row in rows
        ]
        return [np.array(task.result()) for task in tasks]


_worker_runs: list[MeasuredRun] = []
"""In a worker process, and only there: the runs that tasks name by their number."""


def _receive_runs(runs: Sequence[MeasuredRun]) -> None:
    _worker_runs.extend(runs)


def _misses_of_task(row: int, values: Mapping[str, float], slower: float) -> list[float]:
    run = _worker_runs[row]
    return misses(run, calibrated(run, values).slower(slower))


def most_different(runs: Sequence[MeasuredRun], count: int) -> list[MeasuredRun]:
    """Return up to `count` runs, evenly spread over model, split and load."""
    return [runs[row] for row in most_different_rows(runs, count)]


def most_different_rows(runs: Sequence[MeasuredRun], count: int) -> list[int]:
    """Return the same by their numbers."""
    ordered = sorted(range(len(runs)), key=lambda row: _load_key(runs[row]))
    picks = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[pick] for pick in np.unique(picks)]


def _load_key(run: MeasuredRun) -> tuple[str, str, int, float, float]:
    workload = run.workload
    return (
        run.model,
        str(run.config.get("quantization")),
        int(run.config.get("tensor_parallel_size") or 1),
        float(workload.get("concurrency") or workload.get("rate_per_s") or 0.0),
        float(workload.get("isl") or 0.0) / float(workload.get("osl") or 1.0),
    )


def calibrated(run: MeasuredRun, values: Mapping[str, float]) -> Calibration:
    """Return what is shipped for a run's GPU and engine version, with these constants.

    What is known to differ in that version stays, and the user's own operators of the GPU.
    """
    shipped = calibration_from(run, own_operators(load_gpu(run.gpu).name))
    differs = engine_constants(run.engine)["versions"].get(run.engine_version, {})
    return with_constants(shipped, values, kept=differs.get("front_end", {}))


def misses(run: MeasuredRun, calibration: Calibration) -> list[float]:
    """Return log errors over those expected; 0 where an unknown front end hides the GPU."""
    outcome = outcome_of_run(run, calibration)
    known = calibration.front_end.accepts_together
    hidden = outcome.front_end_share >= FRONT_END_LIMITED and not known
    skipped = OPEN_LOOP_ONLY if run.protocol == "closed_loop" else frozenset()
    found = []
    for name, log_sd in METRIC_LOG_SD.items():
        measured = run.measured.get(name)
        if measured and name not in skipped:
            error = 0.0 if hidden else math.log(outcome.values[name] / measured)
            bounded = min(max(error, -LARGEST_LOG_ERROR), LARGEST_LOG_ERROR)
            found.append(weight(run) * bounded / log_sd)
    return found


def weight(run: MeasuredRun) -> float:
    """Return what a run's misses count for."""
    return FLAGGED_WEIGHT if WEIGHED_DOWN.intersection(run.flags) else 1.0
