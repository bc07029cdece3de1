"""Fits an engine's constants on measured serving runs, each run simulated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.calibration import ErrorQuantiles
from cost_models.calibration_io import (
    engine_constants_to_json,
)
from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu, load_model
from engines.registry import as_run, engine_constants, load_calibration
from planner.calibration.constants import (
    Constant,
    fitted_constants,
    shipped_priors,
    with_constants,
)
from planner.calibration.fit import (
    FLAGGED_WEIGHT,
    Fit,
    Fitter,
    calibrated,
    misses,
    most_different_rows,
    weight,
)
from planner.calibration.intervals import fold_intervals, left_out_coverage
from planner.calibration.memory import fit_memory
from planner.calibration.solver import OUTLIER
from planner.calibration.text import text_rates
from planner.files import write_text
from planner.prediction.evaluator import operators_used
from planner.validation.validate import Row, Validation, errors_by_metric, predict_run_with
from planner.workloads.measured import MeasuredRun, read_runs

MOST_FOLDS = 5
"""Parts of the runs of one model that are left out in turn."""

GAINS = ("tpot_ms.mean", "output_tok_per_s", "output_tok_per_s_per_gpu", "ttft_ms.mean")
"""Metrics by which a fit must predict left-out runs better than its priors do."""


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
    priors, prior_line = priors_for(runs)
    checked, gain_lines = kept_where_it_gains(
        fitted_and_left_out(runs, priors=priors, progress=progress), priors
    )
    fit = checked.fit
    shipped = load_calibration(load_gpu(runs[0].gpu), engine)
    memory = fit_memory(runs, shipped)
    fitted = replace(
        with_constants(shipped, fit.values),
        memory=memory.constants,
        intervals=_laid_over(shipped.intervals, _intervals(checked) if checked.has_taught else {}),
        sources=(f"{len(runs)} runs of {names}",),
    )
    rates = text_rates(runs)
    # Where the priors stay this machine is as unknown as before, and so are its intervals.
    unseen: dict[str, list[str]] = {} if checked.has_taught else {"gpus": [], "operators": []}
    content = engine_constants_to_json(fitted) | {
        "versions": engine_constants(engine)["versions"],
        "relative_errors": {name: round(error, 4) for name, error in fit.relative_errors.items()},
        "not_told": list(fit.not_told),
        "data": _data(runs) | unseen,
        **rates.to_json(),
    }
    write_text(Path(out), json.dumps(content, indent=1) + "\n")
    return [
        prior_line,
        *gain_lines,
        *fit.lines(),
        *memory.lines(),
        *rates.lines(),
        *_flagged_lines(runs),
        *_outlier_lines(runs, fit),
        *_left_out_errors(checked.left_out),
        *_coverage_lines(checked),
        *(f"{stage}: {seconds:.0f} s" for stage, seconds in checked.seconds.items()),
    ]


def priors_for(runs: Sequence[MeasuredRun]) -> tuple[Mapping[str, Constant], str]:
    """Return the priors of a fit on these runs, and say them.

    The shipped constants, as far as another machine's tell of this one; round figures where the
    shipped ones rest on some of these runs, which must not teach twice.
    """
    file = engine_constants(runs[0].engine)
    if {run.run_id for run in runs}.intersection(file.get("data", {}).get("runs", ())):
        return fitted_constants(
            file
        ), "priors: round figures (the shipped constants know these runs)"
    return shipped_priors(
        file
    ), "priors: the shipped constants, as far as they tell of your machine"


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
        "gpus": sorted({load_gpu(run.gpu).name for run in runs}),
        "engine_versions": sorted({str(run.engine_version) for run in runs}),
        "models": sorted({run.model for run in runs}),
        "quantizations": sorted({str(run.config.get("quantization")) for run in runs}),
        "operators": sorted(set().union(*map(_operators_used, runs))),
        "protocols": sorted({run.protocol for run in runs}),
        "concurrency": [min(clients), max(clients)] if clients else [],
        "mean_isl": [min(prompts), max(prompts)],
    }


def _operators_used(run: MeasuredRun) -> set[str]:
    return operators_used(as_run(run.engine_config(), run.engine), load_model(run.model))


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


def _intervals(checked: Checked) -> dict[str, ErrorQuantiles]:
    return fold_intervals(checked.left_out, checked.folds)


def _coverage_lines(checked: Checked) -> list[str]:
    """Say how often intervals from other models' runs held a measurement."""
    coverage = left_out_coverage(checked.left_out, checked.folds)
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
class Checked:
    """Constants fitted on all runs, and the predictions of what was left out in turn."""

    fit: Fit
    left_out: tuple[Row, ...]
    folds: tuple[str, ...]
    """What each of them was left out together with."""
    seconds: Mapping[str, float]
    """Wall time by stage."""
    has_taught: bool = True
    """Whether the fit was kept; else its priors were."""

    def of_fold(self, name: str) -> list[Row]:
        """Return the rows that were left out together."""
        return [row for row, own in zip(self.left_out, self.folds, strict=True) if own == name]


def fitted_and_left_out(
    runs: Sequence[MeasuredRun],
    *,
    priors: Mapping[str, Constant] | None = None,
    folds: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Fit on all runs, and predict each fold's with constants fitted on the others'.

    Args:
        runs: Of one engine.
        priors: By constant; round figures where none are given.
        folds: What each run is left out together with; `folds_of` where none are given.
        progress: Called with (fits done, in all).
    """
    folds = folds or folds_of(runs)
    names = sorted(set(folds)) if len(set(folds)) > 1 else []
    show = progress or _silent
    show(0, len(names) + 1)
    left_out: list[Row] = []
    own_folds: list[str] = []
    without: list[Mapping[str, float]] = []
    with Fitter(runs, priors=priors) as fitter:
        fit = fitter.whole()
        for done, name in enumerate(names, 1):
            show(done, len(names) + 1)
            rows = [row for row, own in enumerate(folds) if own == name]
            values = fitter.without(rows).values
            without.append(values)
            own_folds += [name] * len(rows)
            left_out += [predict_run_with(runs[r], calibrated(runs[r], values)) for r in rows]
    return Checked(
        fit=fit.with_jackknife(without),
        left_out=tuple(left_out),
        folds=tuple(own_folds),
        seconds=fitter.seconds,
    )


def kept_where_it_gains(
    checked: Checked, priors: Mapping[str, Constant]
) -> tuple[Checked, list[str]]:
    """Return the fit, unless it predicts runs that it did not see worse than its priors do.

    Left-out runs choose between the two (cross-validation: Stone, JRSS B 36, 1974) by their errors
    in `GAINS`, each metric's as a share of what the priors err. A fit is what priors and runs say
    together: it takes a loss of more than one standard error, not the chance of a few runs, to
    undo it. Then the priors stay, with the errors that they make of these runs.

    Args:
        checked: A fit, and what it says of runs that were left out of it.
        priors: Of that fit.

    Returns:
        What is kept, and words that say it; none where no run was left out.
    """
    values = {name: constant.prior for name, constant in priors.items()}
    rows = [predict_run_with(row.run, calibrated(row.run, values)) for row in checked.left_out]
    before, after = errors_by_metric(rows), errors_by_metric(checked.left_out)
    shown = [name for name in GAINS if name in before and before[name].mape_pct > 0]
    if not shown:
        return checked, []
    words = ", ".join(
        f"{name} {before[name].mape_pct:.1f} -> {after[name].mape_pct:.1f} %" for name in shown
    )
    line = f"runs that were left out, with the priors -> with the fit on the others: {words}"
    scale = {name: before[name].mape_pct / 100 for name in shown}
    gains = [
        _error_share(row, scale) - _error_share(left_out, scale)
        for row, left_out in zip(rows, checked.left_out, strict=True)
    ]
    gain, chance = np.mean(gains), np.std(gains, ddof=1) / math.sqrt(len(gains))
    if gain >= -chance:
        kept = "the fit holds" if gain > 0 else "no loss beyond chance, the fit holds"
        return checked, [f"{line}: {kept}"]
    errors = {name: constant.log_sd for name, constant in priors.items()}
    fit = Fit(values=values, relative_errors=errors, not_told=())
    kept_priors = replace(checked, fit=fit, left_out=tuple(rows), has_taught=False)
    return kept_priors, [f"{line}: a loss, the priors stay"]


def _error_share(row: Row, scale: Mapping[str, float]) -> float:
    """Return a run's mean error, in units of each metric's scale."""
    shares = [
        abs(row.predicted[name] / row.run.measured[name] - 1) / scale[name]
        for name in row.scored()
        if name in scale
    ]
    return math.fsum(shares) / max(len(shares), 1)


def _silent(done: int, in_all: int) -> None:
    """Nobody watches."""


def folds_of(runs: Sequence[MeasuredRun]) -> list[str]:
    """Return what each run is left out together with: alike runs would tell of each other."""
    models = [load_model(run.model).name for run in runs]
    if len(set(models)) > 1:
        return models
    sizes = [str(run.config.get("tensor_parallel_size", 1)) for run in runs]
    if len(set(sizes)) > 1:
        return sizes
    count = min(len(runs), MOST_FOLDS)
    order = most_different_rows(runs, len(runs))
    return [f"part {order.index(row) % count}" for row in range(len(runs))]


def _usable_runs(path: str) -> Iterator[MeasuredRun]:
    for run, _, _ in read_runs(path):
        if run is not None and run.protocol != "capacity" and run.measured:
            yield run
