"""Fits calibration files: operators from tables, step constants from measured runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import Calibration, ErrorQuantiles
from cost_models.calibration_io import (
    SCHEMA_VERSION,
    engine_constants_to_json,
    load_calibration,
    operators_to_json,
    read_engine_file,
)
from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu
from planner.evaluator import Evaluation, Slice
from planner.runs import MeasuredRun, read_runs
from planner.validation import (
    FRONT_END_LIMITED,
    Row,
    Validation,
    predict_run_with,
    run_evaluator,
)

FloatArray = NDArray[np.float64]

FITTED_STEP: Mapping[str, tuple[float, float, float]] = {
    "host_s": (3e-4, 2e-5, 5e-3),
    "tp_gap_s": (1e-6, 1e-8, 5e-5),
    "eager_layer_s": (1e-4, 1e-5, 2e-3),
    "eager_layer_tp_s": (3e-4, 1e-5, 2e-3),
    "elementwise_efficiency": (0.8, 0.3, 1.0),
    "elementwise_launch_s": (1.5e-6, 2e-7, 5e-6),
}
"""Step constants that serving runs can tell: prior, smallest, largest; the rest stay as shipped.

The priors are round figures, the same for every engine, near what an earlier study of the
TensorRT-LLM runs found: a fit on part of those runs is not wholly blind to the others.
"""

PRIOR_LOG_SD = 0.5
"""Standard deviation of a constant's prior, in log: a factor of 1.65 either way."""

RUN_LOG_SD = 0.05
"""Error of a run's TPOT that is expected even of the right constants."""

TTFT_WEIGHT = 0.25
"""Weight of TTFT beside TPOT: it hangs on the protocol more than on the step."""

LARGEST_TTFT_ERROR = 0.6
"""Log error at which a TTFT stops pulling: some rows contain waits that no step explains."""


def calibrate_operators(folder: str, *, gpu: str, out: str) -> list[str]:
    """Fit one GPU's operators on the tables of a folder and write them.

    Raises:
        ProfileError: No table of that GPU.
    """
    from cost_models.fitting.operators import fit_operators  # noqa: PLC0415  needs SciPy

    spec = load_gpu(gpu)
    fitted = fit_operators(Path(folder), spec)
    versions = {fit.source.rsplit(" ", 1)[-1] for fit in fitted.get("gemm", {}).values()}
    content = {
        "schema_version": SCHEMA_VERSION,
        "gpu": spec.name,
        "engine": "trtllm",
        "engine_version": ", ".join(sorted(versions)),
        "source": f"operator tables in {Path(folder).name}",
        "operators": operators_to_json(fitted),
    }
    _write_json(Path(out), content, compact=True)
    return [
        f"{spec.name} {family} {dtype}: {fit.num_points} points, MAPE {fit.mape_pct:.2f} %, "
        f"left-out shapes {fit.holdout_mape_pct:.2f} %"
        for family, fits in fitted.items()
        for dtype, fit in fits.items()
    ]


def calibrate_runs(path: str, *, engine: str, out: str) -> list[str]:
    """Fit an engine's step constants on measured runs and write its calibration file.

    Intervals come from predicting each model's runs with constants fitted on the others.

    Raises:
        ProfileError: The file holds no run of that engine that can be used.
    """
    runs = [run for run in _usable_runs(path) if run.engine == engine]
    if not runs:
        raise ProfileError(f"{path}: holds no usable run of engine {engine!r}")
    constants = fit_step_constants(runs)
    left_out = list(cross_validated(runs))
    prior = _calibrations(runs)[runs[0].gpu]
    fitted = replace(
        prior,
        step=replace(prior.step, **constants),
        intervals=residual_intervals(left_out),
        sources=(f"{len(runs)} runs of {Path(path).name}",),
    )
    shipped = read_engine_file(engine)
    _write_json(
        Path(out),
        engine_constants_to_json(fitted) | {"versions": shipped["versions"]},
        compact=False,
    )
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


def fit_step_constants(runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """Return the step constants nearest to the runs, held by a prior where runs say nothing."""
    from scipy.optimize import least_squares  # noqa: PLC0415  0.9 s that planning need not pay

    calibrations = _calibrations(runs)
    names = list(FITTED_STEP)
    prior, low, high = np.log(np.array([FITTED_STEP[name] for name in names])).T

    def residuals(x: FloatArray) -> FloatArray:
        constants = dict(zip(names, np.exp(x).tolist(), strict=True))
        misses = [miss for run in runs for miss in _misses(run, calibrations, constants)]
        return np.array([*misses, *((x - prior) / PRIOR_LOG_SD)])

    fit = least_squares(
        residuals,
        prior,
        bounds=(low, high),
        loss="soft_l1",
        diff_step=1e-2,
        max_nfev=12,
    )
    return dict(zip(names, np.exp(fit.x).tolist(), strict=True))


def cross_validated(runs: Sequence[MeasuredRun]) -> Iterator[Row]:
    """Predict each model's runs with constants fitted on the other models' runs.

    With one model, its tensor-parallel sizes, then its runs, are left out in turn.
    """
    folds = _folds(runs)
    for fold in sorted(set(folds)):
        rest = [run for run, own in zip(runs, folds, strict=True) if own != fold]
        constants = fit_step_constants(rest)
        calibrations = _calibrations(runs)
        for run, own in zip(runs, folds, strict=True):
            if own == fold:
                calibration = calibrations[run.gpu + run.engine_version]
                step = replace(calibration.step, **constants)
                yield predict_run_with(run, replace(calibration, step=step))


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
    models = [run.model for run in runs]
    if len(set(models)) > 1:
        return models
    sizes = [str(run.config.get("tensor_parallel_size", 1)) for run in runs]
    return sizes if len(set(sizes)) > 1 else [run.run_id for run in runs]


def _misses(
    run: MeasuredRun, calibrations: Mapping[str, Calibration], constants: Mapping[str, Any]
) -> tuple[float, float]:
    """Weighted log errors of TPOT and TTFT; 0 where the front end hides the GPU."""
    calibration = calibrations[run.gpu + run.engine_version]
    step = replace(calibration.step, **constants)
    evaluator, config = run_evaluator(run, replace(calibration, step=step))
    result = evaluator.evaluate(Slice(base=config, columns={}), with_highest_rate=False)
    if result.front_end_share[0] >= FRONT_END_LIMITED:
        return 0.0, 0.0
    tpot = _log_error(run, result, "tpot_ms.mean")
    ttft = _log_error(run, result, "ttft_ms.mean")
    ttft = min(max(ttft, -LARGEST_TTFT_ERROR), LARGEST_TTFT_ERROR)
    return tpot / RUN_LOG_SD, TTFT_WEIGHT * ttft / RUN_LOG_SD


def _log_error(run: MeasuredRun, result: Evaluation, name: str) -> float:
    measured = run.measured.get(name)
    return math.log(float(result.metrics[name][0]) / measured) if measured else 0.0


def _usable_runs(path: str) -> Iterator[MeasuredRun]:
    for run, _, _ in read_runs(path):
        if run is not None and run.protocol != "capacity" and run.measured:
            yield run


def _calibrations(runs: Sequence[MeasuredRun]) -> dict[str, Calibration]:
    """What is shipped for each GPU and engine version of the runs."""
    found = {}
    for run in runs:
        key = run.gpu + run.engine_version
        if key not in found:
            gpu = load_gpu(run.gpu)
            found[key] = load_calibration(gpu, run.engine, engine_version=run.engine_version)
            found[run.gpu] = load_calibration(gpu, run.engine)
    return found


def _write_json(path: Path, content: dict[str, Any], *, compact: bool) -> None:
    """Write whole or not at all."""
    text = json.dumps(content, separators=(",", ":")) if compact else json.dumps(content, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
