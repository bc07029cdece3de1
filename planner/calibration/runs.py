"""Fits an engine's constants on measured serving runs, each run simulated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from cost_models.calibration import Calibration, ErrorQuantiles
from cost_models.calibration_io import (
    engine_constants_to_json,
    load_calibration,
    read_engine_file,
)
from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu, load_model
from planner.calibration.constants import fitted_constants, with_constants
from planner.files import write_text
from planner.measuring.runs import MeasuredRun, read_runs
from planner.validation.validate import (
    FRONT_END_LIMITED,
    Row,
    Validation,
    predict_run_with,
    run_calibration,
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

ITERATIONS = 8

SMALLEST_STEP = 0.05
"""Change of a constant, in its prior's standard deviations, by which its effect is measured."""

OUTLIER = 3.0
"""Expected errors beyond which a metric's pull grows no more."""


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
    constants, left_out = fitted_and_left_out(runs, progress=progress)
    fitted = replace(
        with_constants(load_calibration(load_gpu(runs[0].gpu), engine), constants),
        intervals=residual_intervals(left_out),
        sources=(f"{len(runs)} runs of {names}",),
    )
    versions = read_engine_file(engine)["versions"]
    content = engine_constants_to_json(fitted) | {"versions": versions}
    write_text(Path(out), json.dumps(content, indent=1) + "\n")
    lines = [f"{name} = {value:.4g}" for name, value in constants.items()]
    lines += _left_out_errors(left_out)
    for name, quantiles in fitted.intervals.items():
        lines.append(
            f"{name}: 90 % of left-out errors between {100 * math.expm1(quantiles.log_q05):+.1f} % "
            f"and {100 * math.expm1(quantiles.log_q95):+.1f} %"
        )
    return lines


def _left_out_errors(rows: Sequence[Row]) -> list[str]:
    """Error of each model's runs when the constants were fitted on the others."""
    checked = Validation(rows=tuple(rows), skipped=()).without_front_end_limited()
    return [
        f"{group.gpu} {group.model} left out, {name}: n {error.n}, MAPE {error.mape_pct:.1f} %, "
        f"bias {error.bias_pct:+.1f} %"
        for group in checked.groups
        for name, error in group.metrics.items()
    ]


def fit_constants(runs: Sequence[MeasuredRun]) -> dict[str, float]:
    """Return the constants nearest to the runs, held by a prior where runs say nothing."""
    chosen = most_different(runs, MOST_RUNS)
    table = fitted_constants(read_engine_file(runs[0].engine))
    names = list(table)
    prior, low, high = np.log([[c.prior, c.low, c.high] for c in table.values()]).T
    log_sd = np.array([c.log_sd for c in table.values()])

    def misses(z: FloatArray) -> FloatArray:
        values = dict(zip(names, np.exp(prior + log_sd * z).tolist(), strict=True))
        return np.array([m for run in chosen for m in _misses(run, calibrated(run, values))])

    told = _told(misses, np.zeros(prior.size))
    z = np.zeros(prior.size)

    def residuals(free: FloatArray) -> FloatArray:
        z[told] = free
        return np.concatenate([misses(z), free])

    fit = least_squares(
        residuals,
        z[told],
        bounds=((low - prior)[told] / log_sd[told], (high - prior)[told] / log_sd[told]),
        loss="soft_l1",
        f_scale=OUTLIER,
        diff_step=SMALLEST_STEP,
        max_nfev=ITERATIONS,
    )
    z[told] = fit.x
    return dict(zip(names, np.exp(prior + log_sd * z).tolist(), strict=True))


def _told(misses: Callable[[FloatArray], FloatArray], start: FloatArray) -> NDArray[np.bool_]:
    """Which constants change any prediction at all; the others stay at their prior."""
    base = misses(start)
    shifted = start + np.diag(np.full(start.size, SMALLEST_STEP))
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

    What is known to differ in that version stays.
    """
    shipped = run_calibration(run)
    differs = read_engine_file(run.engine)["versions"].get(run.engine_version, {})
    return with_constants(shipped, values, kept=differs.get("front_end", {}))


def fitted_and_left_out(
    runs: Sequence[MeasuredRun], *, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, float], list[Row]]:
    """Fit on all runs, and predict each model's runs with constants fitted on the others'.

    With one model, its tensor-parallel sizes, then its runs, are left out in turn.

    Returns:
        The constants fitted on all, and the predictions of what was left out.
    """
    folds = _folds(runs)
    names = sorted(set(folds))
    rests = [[run for run, own in zip(runs, folds, strict=True) if own != name] for name in names]
    constants, *partial = _fits([runs, *(rest for rest in rests if rest)], progress=progress)
    fitted_without = dict(
        zip((n for n, rest in zip(names, rests, strict=True) if rest), partial, strict=True)
    )
    left_out = [
        predict_run_with(run, calibrated(run, fitted_without[own]))
        for run, own in zip(runs, folds, strict=True)
        if own in fitted_without
    ]
    return constants, left_out


def _fits(
    samples: Sequence[Sequence[MeasuredRun]], *, progress: Callable[[int, int], None] | None
) -> list[dict[str, float]]:
    """Fit constants on each sample, as many at a time as there are cores."""
    workers = min(len(samples), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        fits = [pool.submit(fit_constants, list(sample)) for sample in samples]
        for done, _ in enumerate(as_completed(fits), 1):
            if progress is not None:
                progress(done, len(fits))
        return [fit.result() for fit in fits]


def residual_intervals(rows: Sequence[Row]) -> dict[str, ErrorQuantiles]:
    """Return the 5th and 95th percentile of log(measured / predicted) by metric."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        if row.front_end_share >= FRONT_END_LIMITED:
            continue
        for name in row.scored():
            error = math.log(row.run.measured[name] / row.predicted[name])
            errors.setdefault(name, []).append(error)
    return {
        name: ErrorQuantiles(
            log_q05=round(float(np.quantile(values, 0.05)), 4),
            log_q95=round(float(np.quantile(values, 0.95)), 4),
        )
        for name, values in sorted(errors.items())
        if len(values) >= 4
    }


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
            misses.append(min(max(error, -LARGEST_LOG_ERROR), LARGEST_LOG_ERROR) / log_sd)
    return misses


def _usable_runs(path: str) -> Iterator[MeasuredRun]:
    for run, _, _ in read_runs(path):
        if run is not None and run.protocol != "capacity" and run.measured:
            yield run
