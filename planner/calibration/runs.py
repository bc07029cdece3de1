"""Fits an engine's constants on measured serving runs, each run simulated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_models.calibration import ErrorQuantiles
from cost_models.calibration_io import (
    engine_constants_to_json,
    load_calibration,
    read_engine_file,
)
from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu, load_model
from planner.calibration.constants import with_constants
from planner.calibration.fit import (
    FLAGGED_WEIGHT,
    Fit,
    calibrated,
    fit_constants,
    misses,
    seen_runs,
    weight,
)
from planner.calibration.host import fit_host, on_host
from planner.calibration.intervals import fold_intervals, left_out_coverage, residual_intervals
from planner.calibration.memory import fit_memory
from planner.calibration.solver import OUTLIER
from planner.calibration.text import text_rates
from planner.files import write_text
from planner.measuring.runs import MeasuredRun, read_runs
from planner.validation.validate import Row, Validation, predict_run_with


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
    runs = _runs_of(paths, engine)
    fit, left_out = fitted_and_left_out(runs, progress=progress)
    shipped = load_calibration(load_gpu(runs[0].gpu), engine)
    memory = fit_memory(runs, shipped)
    fitted = replace(
        with_constants(shipped, fit.values),
        memory=memory.constants,
        intervals=_laid_over(shipped.intervals, _intervals(left_out)),
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


def calibrate_host(paths: Sequence[str], *, engine: str, out: str) -> list[str]:
    """Fit how slow the host of some runs is; write what is known of the engine on such a host.

    All else stays as shipped, so a few runs are enough.

    Raises:
        ProfileError: The files hold no run of that engine that can be used.
    """
    runs = _runs_of(paths, engine)
    fit = fit_host(runs)
    names = ", ".join(Path(path).name for path in paths)
    slower = replace(
        on_host(load_calibration(load_gpu(runs[0].gpu), engine), fit.slowness),
        sources=(f"host of {len(runs)} runs of {names}",),
    )
    content = engine_constants_to_json(slower) | {
        "versions": read_engine_file(engine)["versions"],
        "relative_errors": {"host_slowness": round(fit.relative_error, 4)},
        "data": _data(runs),
    }
    write_text(Path(out), json.dumps(content, indent=1) + "\n")
    return [fit.line(), *_flagged_lines(runs)]


def _runs_of(paths: Sequence[str], engine: str) -> list[MeasuredRun]:
    runs = [run for path in paths for run in _usable_runs(path) if run.engine == engine]
    if not runs:
        names = ", ".join(Path(path).name for path in paths)
        raise ProfileError(f"{names}: no usable run of engine {engine!r}")
    return runs


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
        run.run_id: max(map(abs, misses(run, calibrated(run, fit.values))), default=0.0)
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
        if weight(run) < 1
    ]


def _intervals(left_out: Sequence[Row]) -> dict[str, ErrorQuantiles]:
    folds = _folds([row.run for row in left_out])
    return fold_intervals(left_out, folds) if len(set(folds)) > 1 else residual_intervals(left_out)


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
    seen = seen_runs(runs)
    fit = fit_constants(runs, seen=seen)
    left_out, without = [], []
    for done, name in enumerate(names, 1):
        show(done, len(names) + 1)
        rest = [run for run, own in zip(runs, folds, strict=True) if own != name]
        if rest:
            shown = [one for one, own in zip(seen, folds, strict=True) if own != name]
            values = fit_constants(rest, seen=shown).values
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


def _usable_runs(path: str) -> Iterator[MeasuredRun]:
    for run, _, _ in read_runs(path):
        if run is not None and run.protocol != "capacity" and run.measured:
            yield run
