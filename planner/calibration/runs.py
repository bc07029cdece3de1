"""Fits an engine's constants on measured serving runs, each run simulated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import Calibration, ErrorQuantiles
from cost_models.calibration_io import (
    engine_constants_to_json,
    load_calibration,
    read_engine_file,
)
from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu, load_model
from planner.calibration.constants import fitted_constants, with_constants
from planner.calibration.intervals import left_out_coverage, residual_intervals
from planner.calibration.memory import fit_memory
from planner.calibration.own import own_operators
from planner.calibration.solver import OUTLIER, STEP, solve
from planner.calibration.text import text_rates
from planner.files import write_text
from planner.measuring.runs import MeasuredRun, read_runs
from planner.validation.validate import (
    FRONT_END_LIMITED,
    Row,
    Validation,
    calibration_from,
    predict_run_with,
)

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

MOST_RUNS = 32
"""Runs on which constants are fitted; of more, those are taken that differ most."""

ITERATIONS = 6

FEWEST_GROUPS = 3
"""Groups of runs without which leaving one out says nothing of the spread."""

NOT_TOLD = 0.9
"""Standard error, as a share of the prior's, from which runs count as silent on a constant."""

FLAGGED_WEIGHT = 0.3
"""Weight of a run's misses when something else than engine and GPU may have set its times."""

WEIGHED_DOWN = frozenset({"client_limited", "throttled", "shared_gpu", "stalled", "cached_prompts"})
"""Flags that do so."""


def calibrate_runs(
    paths: Sequence[str],
    *,
    engine: str,
    out: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Fit an engine's constants on the measured runs of some files; write its calibration file.

    Intervals come from predicting each model's runs with constants fitted on the others.

    Raises:
        ProfileError: The files hold no run of that engine that can be used.
    """
    names = ", ".join(Path(path).name for path in paths)
    runs = [run for path in paths for run in _usable_runs(path) if run.engine == engine]
    if not runs:
        raise ProfileError(f"{names}: no usable run of engine {engine!r}")
    fit, left_out = fitted_and_left_out(runs, progress=progress)
    shipped = load_calibration(load_gpu(runs[0].gpu), engine)
    memory = fit_memory(runs, shipped)
    fitted = replace(
        with_constants(shipped, fit.values),
        memory=memory.constants,
        intervals=_laid_over(shipped.intervals, residual_intervals(left_out)),
        sources=(f"{len(runs)} runs of {names}",),
    )
    rates = text_rates(runs)
    content = engine_constants_to_json(fitted) | {
        "versions": read_engine_file(engine)["versions"],
        "relative_errors": {name: round(error, 4) for name, error in fit.relative_errors.items()},
        "not_told": list(fit.not_told),
        "data": _data(runs),
        **rates.to_json(),
    }
    write_text(Path(out), json.dumps(content, indent=1) + "\n")
    return [
        *fit.lines(),
        *memory.lines(),
        *rates.lines(),
        *_flagged_lines(runs),
        *_outlier_lines(runs, fit),
        *_left_out_errors(left_out),
        *_coverage_lines(left_out),
    ]


def _laid_over(
    shipped: Mapping[str, ErrorQuantiles], own: Mapping[str, ErrorQuantiles]
) -> dict[str, ErrorQuantiles]:
    """Intervals of one's own, and the shipped ones of metrics that they do not know."""
    known = {key.rpartition("/")[2] for key in own}
    rest = {key: found for key, found in shipped.items() if key.rpartition("/")[2] not in known}
    return {**rest, **own}


def _data(runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """What the constants rest on: runs, versions, and the range that they cover."""
    loads = [run.load() for run in runs]
    clients = [load.concurrency for load in loads if load.concurrency]
    prompts = [load.isl.mean for load in loads]
    return {
        "runs": [run.run_id for run in runs],
        "gpus": sorted({run.gpu for run in runs}),
        "engine_versions": sorted({str(run.engine_version) for run in runs}),
        "models": sorted({run.model for run in runs}),
        "quantizations": sorted({str(run.config.get("quantization")) for run in runs}),
        "protocols": sorted({run.protocol for run in runs}),
        "concurrency": [min(clients), max(clients)] if clients else [],
        "mean_isl": [min(prompts), max(prompts)],
    }


def _outlier_lines(runs: Sequence[MeasuredRun], fit: Fit) -> list[str]:
    """Name the runs that no constants explain; their pull was bounded."""
    worst = {
        run.run_id: max(map(abs, _misses(run, calibrated(run, fit.values))), default=0.0)
        for run in runs
    }
    return [
        f"{run_id}: outlier, off by up to {miss:.1f} expected errors; its pull was bounded"
        for run_id, miss in sorted(worst.items(), key=lambda item: -item[1])
        if miss > OUTLIER
    ]


def _flagged_lines(runs: Sequence[MeasuredRun]) -> list[str]:
    """Name the runs that count for less."""
    return [
        f"{run.run_id}: {', '.join(run.flags)}; counts for {100 * FLAGGED_WEIGHT:.0f} %"
        for run in runs
        if _weight(run) < 1
    ]


def _coverage_lines(left_out: Sequence[Row]) -> list[str]:
    """Say how often intervals from other models' runs held a measurement."""
    folds = _folds([row.run for row in left_out])
    coverage = left_out_coverage(left_out, folds) if len(set(folds)) > 1 else {}
    return [
        f"{name}: {100 * share:.0f} % of {count} measurements inside the 90 % interval of others"
        for name, (count, share) in coverage.items()
    ]


def _left_out_errors(rows: Sequence[Row]) -> list[str]:
    """Error of each model's runs when the constants were fitted on the others."""
    checked = Validation(rows=tuple(rows), skipped=()).without_front_end_limited()
    return [
        f"{group.gpu} {group.model} left out, {name}: n {error.n}, MAPE {error.mape_pct:.1f} %, "
        f"bias {error.bias_pct:+.1f} %"
        for group in checked.groups
        for name, error in group.metrics.items()
    ]


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


def fit_constants(runs: Sequence[MeasuredRun]) -> Fit:
    """Return the constants nearest to the runs, held by a prior where runs say nothing."""
    chosen = most_different(runs, MOST_RUNS)
    table = fitted_constants(read_engine_file(runs[0].engine))
    names = list(table)
    prior, low, high = np.log([[c.prior, c.low, c.high] for c in table.values()]).T
    log_sd = np.array([c.log_sd for c in table.values()])
    z = np.zeros(prior.size)

    def values_at(z: FloatArray) -> dict[str, float]:
        return dict(zip(names, np.exp(prior + log_sd * z).tolist(), strict=True))

    with _Workers(chosen) as workers:

        def misses(z: FloatArray) -> FloatArray:
            return workers.misses(values_at(z))

        told = _told(misses, np.zeros(prior.size))

        def residuals(free: FloatArray) -> FloatArray:
            z[told] = free
            return np.concatenate([misses(z), free])

        fit = solve(
            residuals,
            z[told],
            bounds=((low - prior)[told] / log_sd[told], (high - prior)[told] / log_sd[told]),
            evaluations=ITERATIONS,
        )
    z[told] = fit.x
    # The prior is part of the residuals, so 1 is its own standard deviation.
    deviations = np.ones(prior.size)
    deviations[told] = np.sqrt(np.diag(np.linalg.inv(fit.jac.T @ fit.jac)))
    return Fit(
        values=values_at(z),
        relative_errors=dict(zip(names, (log_sd * deviations).tolist(), strict=True)),
        not_told=tuple(n for n, d in zip(names, deviations, strict=True) if d > NOT_TOLD),
    )


class _Workers:
    """Processes that predict runs, one run a task: all cores work, and none outlives a task.

    Args:
        runs: What is predicted; sent to each process once.
    """

    def __init__(self, runs: Sequence[MeasuredRun]) -> None:
        self._num_runs = len(runs)
        self._pool = ProcessPoolExecutor(
            min(len(runs), os.cpu_count() or 1),
            mp_context=get_context("spawn"),
            initializer=_receive_runs,
            initargs=(list(runs),),
        )

    def __enter__(self) -> _Workers:
        """Return itself; the processes start with the first task."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def misses(self, values: Mapping[str, float]) -> FloatArray:
        """Return the misses of all runs under these constants, in order."""
        tasks = [(index, dict(values)) for index in range(self._num_runs)]
        return np.concatenate(list(self._pool.map(_misses_of_task, tasks)))


_worker_runs: list[MeasuredRun] = []
"""In a worker process, and only there: the runs that tasks name by their number."""


def _receive_runs(runs: Sequence[MeasuredRun]) -> None:
    _worker_runs.extend(runs)


def _misses_of_task(task: tuple[int, dict[str, float]]) -> list[float]:
    index, values = task
    run = _worker_runs[index]
    return _misses(run, calibrated(run, values))


def _told(misses: Callable[[FloatArray], FloatArray], start: FloatArray) -> NDArray[np.bool_]:
    """Which constants change any prediction at all; the others stay at their prior."""
    base = misses(start)
    shifted = start + np.diag(np.full(start.size, STEP))
    return np.array([bool(np.abs(misses(z) - base).max() > 0) for z in shifted])


def most_different(runs: Sequence[MeasuredRun], count: int) -> list[MeasuredRun]:
    """Return up to `count` runs, evenly spread over model, split and load."""
    ordered = sorted(runs, key=_load_key)
    rows = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return [ordered[row] for row in rows]


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
    differs = read_engine_file(run.engine)["versions"].get(run.engine_version, {})
    return with_constants(shipped, values, kept=differs.get("front_end", {}))


def fitted_and_left_out(
    runs: Sequence[MeasuredRun], *, progress: Callable[[int, int], None] | None = None
) -> tuple[Fit, list[Row]]:
    """Fit on all runs, and predict each model's runs with constants fitted on the others'.

    With one model, its tensor-parallel sizes, then its runs, are left out in turn.

    Returns:
        The constants fitted on all, and the predictions of what was left out.
    """
    folds = _folds(runs)
    names = sorted(set(folds))
    show = progress or _silent
    show(0, len(names) + 1)
    fit = fit_constants(runs)
    left_out, without = [], []
    for done, name in enumerate(names, 1):
        show(done, len(names) + 1)
        rest = [run for run, own in zip(runs, folds, strict=True) if own != name]
        if rest:
            values = fit_constants(rest).values
            without.append(values)
            left = [run for run, own in zip(runs, folds, strict=True) if own == name]
            left_out += [predict_run_with(run, calibrated(run, values)) for run in left]
    return fit.with_jackknife(without), left_out


def _silent(done: int, in_all: int) -> None:
    """Nobody watches."""


def _folds(runs: Sequence[MeasuredRun]) -> list[str]:
    models = [load_model(run.model).name for run in runs]
    if len(set(models)) > 1:
        return models
    sizes = [str(run.config.get("tensor_parallel_size", 1)) for run in runs]
    return sizes if len(set(sizes)) > 1 else [run.run_id for run in runs]


def _misses(run: MeasuredRun, calibration: Calibration) -> list[float]:
    """Log errors over those expected; 0 where the front end hides the GPU."""
    row = predict_run_with(run, calibration)
    hidden = row.front_end_share >= FRONT_END_LIMITED
    skipped = OPEN_LOOP_ONLY if run.protocol == "closed_loop" else frozenset()
    misses = []
    for name, log_sd in METRIC_LOG_SD.items():
        measured = run.measured.get(name)
        if measured and name not in skipped:
            error = 0.0 if hidden else math.log(row.predicted[name] / measured)
            bounded = min(max(error, -LARGEST_LOG_ERROR), LARGEST_LOG_ERROR)
            misses.append(_weight(run) * bounded / log_sd)
    return misses


def _weight(run: MeasuredRun) -> float:
    return FLAGGED_WEIGHT if WEIGHED_DOWN.intersection(run.flags) else 1.0


def _usable_runs(path: str) -> Iterator[MeasuredRun]:
    for run, _, _ in read_runs(path):
        if run is not None and run.protocol != "capacity" and run.measured:
            yield run
