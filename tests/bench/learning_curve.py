"""How much measured runs teach: `python -m tests.bench.learning_curve RUNS.jsonl ... --out FILE`.

Holds out a part of the runs before anything is fitted: every third one in order of model,
precision and load (`--splits 3` each third in turn), or with `--by-model` each model in turn.
Predicts what was held out with what is known before (0 runs), then with constants fitted on more
and more of the others (those that differ most), per metric and kind of load, beside the bootstrap
error of the measurement itself.

What is known before: `--before shipped` the shipped constants, which must not rest on any of the
runs; `--before RUNS.jsonl` constants fitted on other runs, as a profile that never saw these would
hold; nothing: the round priors of every constant. `--microbench DIR` adds the operators of the
GPU's own micro-benchmarks. How often intervals of 90 % held what was held out is said beside.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu, load_model
from engines.registry import engine_constants
from planner.calibration.constants import Constant, fitted_constants, shipped_priors
from planner.calibration.fit import calibrated, fit_constants, most_different
from planner.calibration.operators import calibrate_operators
from planner.files import write_text
from planner.own_calibrations import own_folder
from planner.validation.validate import FRONT_END_LIMITED, Row, predict_run_with
from planner.workloads.measured import MeasuredRun, read_runs
from tests.bench import run_bench

EVERYWHERE = (
    "tpot_ms.mean", "output_tok_per_s", "output_tok_per_s_per_gpu", "e2el_ms.p50", "e2el_ms.p99",
    "itl_ms.p99", "ttft_ms.mean", "kv_cache_tokens",
)  # fmt: skip
OPEN_LOOP = ("ttft_ms.p50", "ttft_ms.p99")

RESAMPLES = 200

FloatArray = NDArray[np.float64]
Statistic = Callable[[FloatArray], Any]
Priors = Mapping[str, Constant]
Split = tuple[list[MeasuredRun], list[MeasuredRun]]
"""Runs to fit on, and runs held out."""


def main() -> None:
    """Print the curve and write it for `planner validate --report --learning-curve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--before", action="append", default=[], metavar="shipped|RUNS.jsonl")
    parser.add_argument("--sizes", default="4,8,16")
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--by-model", action="store_true")
    parser.add_argument("--microbench", default="")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    # Nothing of the user's own may teach.
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="planner-curve-")
    runs = read_serving_runs(arguments.runs, arguments.engine)
    priors, before = _known_before(arguments.before, runs)
    splits = list(_splits(runs, by_model=arguments.by_model, count=arguments.splits))
    values = {name: constant.prior for name, constant in priors.items()}
    first = [_row(run, values) for _, held in splits for run in held]
    # The same runs and kinds of load in every point: as they are predicted before any is known.
    kinds = {r.run.run_id: r.regime for r in first if r.front_end_share < FRONT_END_LIMITED}
    points = [_point(before, 0, first, kinds)]
    if arguments.microbench:
        _install(arguments.microbench, runs[0].gpu)
        rows = [_row(run, values) for _, held in splits for run in held]
        points.append(_point(f"{before}, own micro-benchmarks", 0, rows, kinds))
    for size in (int(size) for size in arguments.sizes.split(",")):
        rows = [row for split in splits for row in _learned(split, size, priors)]
        points.append(_point("fitted", size, rows, kinds))
    content = {
        "command": _command(arguments),
        "before": before,
        "held_out": sorted(kinds),
        "bootstrap_error_pct": _own_errors([run for _, held in splits for run in held], kinds),
        "points": points,
    }
    write_text(Path(arguments.out), json.dumps(content, indent=1) + "\n")


def _command(arguments: argparse.Namespace) -> str:
    words = ["python -m tests.bench.learning_curve", *arguments.runs]
    words += ["--engine", arguments.engine]
    words += [word for name in arguments.before for word in ("--before", name)]
    words += ["--sizes", arguments.sizes, "--splits", str(arguments.splits)]
    words += ["--by-model"] * arguments.by_model
    words += ["--microbench", arguments.microbench] if arguments.microbench else []
    return " ".join([*words, "--out", arguments.out])


def read_serving_runs(paths: Sequence[str], engine: str) -> list[MeasuredRun]:
    """Return the serving runs of an engine without drafts."""
    return [
        run
        for path in paths
        for run, _, _ in read_runs(path)
        if run is not None
        and run.engine == engine
        and run.protocol != "capacity"
        and not run.config.get("decoding_type")
    ]


def _known_before(before: Sequence[str], runs: Sequence[MeasuredRun]) -> tuple[Priors, str]:
    """Return the priors of the fits, and what they rest on.

    Raises:
        ProfileError: They rest on runs that are held out or fitted here.
    """
    file = engine_constants(runs[0].engine)
    if not before:
        return fitted_constants(file), "priors"
    if list(before) == ["shipped"]:
        _check_unseen(file["data"]["runs"], runs)
        return shipped_priors(file), "shipped constants"
    others = read_serving_runs(before, runs[0].engine)
    _check_unseen([run.run_id for run in others], runs)
    fit = fit_constants(others)
    errors = {**file, "relative_errors": fit.relative_errors}
    return shipped_priors(errors, fit.values), f"constants of {len(others)} other runs"


def _check_unseen(known: Sequence[str], runs: Sequence[MeasuredRun]) -> None:
    seen = {run.run_id for run in runs}.intersection(known)
    if seen:
        raise ProfileError(f"{len(seen)} runs are known before they teach, {min(seen)} among them")


def _splits(runs: Sequence[MeasuredRun], *, by_model: bool, count: int) -> Iterator[Split]:
    ordered = most_different(runs, len(runs))
    if not by_model:
        for turn in (1, 0, 2)[:count]:
            yield [r for i, r in enumerate(ordered) if i % 3 != turn], ordered[turn::3]
        return
    models = [load_model(run.model).name for run in ordered]
    for model in sorted(set(models)):
        pairs = list(zip(ordered, models, strict=True))
        yield [r for r, own in pairs if own != model], [r for r, own in pairs if own == model]


def _learned(split: Split, size: int, priors: Priors) -> list[Row]:
    fitted, held = split
    values = fit_constants(most_different(fitted, size), priors=priors).values
    taught = tuple({load_gpu(run.gpu).name for run in fitted})
    return [_row(run, values, taught) for run in held]


def _row(run: MeasuredRun, values: Mapping[str, float], taught: tuple[str, ...] = ()) -> Row:
    """Predict a run; its GPU's host is borrowed unless its own runs `taught` the constants."""
    calibration = calibrated(run, values)
    return predict_run_with(run, replace(calibration, knows_host=calibration.gpu in taught))


def _point(
    title: str, num_runs: int, rows: Sequence[Row], kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Mean and largest error in percent of each metric over what was held out."""
    kept = [row for row in rows if row.run.run_id in kinds]
    print(f"{title}, {num_runs} runs, {len(kept)} held out", flush=True)  # noqa: T201
    everywhere = _errors(kept)
    by_kind = {
        kind: _errors([row for row in kept if kinds[row.run.run_id] == kind])
        for kind in sorted(set(kinds.values()))
    }
    for kind, found in {"all": everywhere, **by_kind}.items():
        for name, error in found.items():
            print(  # noqa: T201
                f"  {kind:24} {name:18} n {error['n']:3.0f}  mean {error['mape_pct']:5.1f} %  "
                f"worst {error['worst_pct']:6.1f} %  in 90 % {error['covered_pct']:3.0f} %",
                flush=True,
            )
    means = {name: error["mape_pct"] for name, error in everywhere.items()}
    return {
        "num_runs": num_runs,
        "label": title,
        "mape_pct": means,
        "errors": everywhere,
        "by_load": by_kind,
    }


def _errors(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found = {}
    for name in (*EVERYWHERE, *OPEN_LOOP):
        having = [r for r in rows if r.run.measured.get(name) and _counts(r.run, name)]
        if having:
            measured = np.array([r.run.measured[name] for r in having])
            errors = np.abs(100 * (np.array([r.predicted[name] for r in having]) / measured - 1))
            low, high = np.array([r.intervals[name] for r in having]).T
            found[name] = {
                "n": len(having),
                "mape_pct": round(float(errors.mean()), 2),
                "worst_pct": round(float(errors.max()), 1),
                "covered_pct": round(
                    float(100 * np.mean((low <= measured) & (measured <= high))), 1
                ),
            }
    return found


def _own_errors(
    runs: Sequence[MeasuredRun], kinds: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return by how much the measured figures themselves would vary, by kind of load."""
    rng = np.random.default_rng(0)
    spreads: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run.run_id in kinds and "requests_file" in run.workload:
            for name, spread in _own_spreads(run, rng).items():
                for kind in ("all", kinds[run.run_id]):
                    spreads.setdefault(kind, {}).setdefault(name, []).append(spread)
    return {
        kind: {name: round(float(np.mean(found)), 2) for name, found in by_name.items()}
        for kind, by_name in sorted(spreads.items())
    }


def _own_spreads(run: MeasuredRun, rng: np.random.Generator) -> dict[str, float]:
    """Bootstrap over the requests of a run: standard error in percent, by metric."""
    with gzip.open(run.folder / str(run.workload["requests_file"]), "rt") as file:
        lines = [r for r in map(json.loads, file) if r["ttft_ms"] is not None]
    ttft, e2el, osl = (np.array([r[k] for r in lines]) for k in ("ttft_ms", "e2el_ms", "osl"))
    tpot = (e2el - ttft)[osl > 1] / (osl[osl > 1] - 1)
    statistics: dict[str, tuple[FloatArray, Statistic]] = {
        "tpot_ms.mean": (tpot, np.mean),
        "e2el_ms.p50": (e2el, np.median),
        "e2el_ms.p99": (e2el, _p99),
        "ttft_ms.mean": (ttft, np.mean),
        "ttft_ms.p50": (ttft, np.median),
        "ttft_ms.p99": (ttft, _p99),
    }
    return {
        name: float(100 * np.std(_resampled(values, statistic, rng)) / statistic(values))
        for name, (values, statistic) in statistics.items()
        if _counts(run, name)
    }


def _resampled(
    values: FloatArray, statistic: Statistic, rng: np.random.Generator
) -> list[FloatArray]:
    return [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(RESAMPLES)]


def _p99(values: FloatArray) -> float:
    return float(np.quantile(values, 0.99))


def _counts(run: MeasuredRun, metric: str) -> bool:
    """Median and tail of TTFT hang on the phase of the waves in a closed loop."""
    return metric not in OPEN_LOOP or run.protocol == "open_loop"


def _install(microbench: str, gpu: str) -> None:
    path = own_folder() / "gpus" / f"{load_gpu(gpu).name}.json"
    path.parent.mkdir(parents=True)
    calibrate_operators(microbench, gpu=gpu, out=str(path))


if __name__ == "__main__":
    run_bench(main)
