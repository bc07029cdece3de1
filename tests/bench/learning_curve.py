"""How much measured runs teach: `python -m tests.bench.learning_curve RUNS.jsonl ... --out FILE`.

Holds out a part of the runs before anything is fitted: every third one in order of model, precision
and load, or with `--by-model` each model in turn. Fits the engine's constants on more and more of
the others (those that differ most) and predicts what was held out. 0 runs are the priors; with
`--microbench DIR` also the priors with operators fitted on a GPU's own micro-benchmarks.
Sixteen runs take about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration_io import read_engine_file
from cost_models.profile_io import load_gpu, load_model
from planner.calibration.constants import fitted_constants
from planner.calibration.fit import calibrated, fit_constants, most_different
from planner.calibration.operators import calibrate_operators
from planner.calibration.own import own_folder
from planner.files import write_text
from planner.measuring.runs import MeasuredRun, read_runs
from planner.validation.validate import FRONT_END_LIMITED, Row, predict_run_with
from tests.bench import run_bench

EVERYWHERE = (
    "tpot_ms.mean", "output_tok_per_s", "output_tok_per_s_per_gpu", "e2el_ms.p50", "e2el_ms.p99",
    "itl_ms.p99", "ttft_ms.mean",
)  # fmt: skip
OPEN_LOOP = ("ttft_ms.p50", "ttft_ms.p99")


RESAMPLES = 200

FloatArray = NDArray[np.float64]
Statistic = Callable[[FloatArray], Any]


def main() -> None:
    """Print the curve and write it for `planner validate --report --learning-curve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--sizes", default="4,8,16")
    parser.add_argument("--by-model", action="store_true")
    parser.add_argument("--microbench", default="")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    runs = [
        run
        for path in arguments.runs
        for run, _, _ in read_runs(path)
        if run is not None and run.engine == arguments.engine and run.protocol != "capacity"
    ]
    # Nothing of the user's own may teach.
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="planner-curve-")
    splits = list(_splits(runs, by_model=arguments.by_model))
    sizes = [int(size) for size in arguments.sizes.split(",")]
    priors = {n: c.prior for n, c in fitted_constants(read_engine_file(arguments.engine)).items()}
    _print_own_errors([run for _, held in splits for run in held])
    first = [_row(run, priors) for _, held in splits for run in held]
    # The same runs in every row of the curve: those whose rate the GPU decides, by the priors.
    scored = {r.run.run_id for r in first if r.front_end_share < FRONT_END_LIMITED}
    points = [_point("priors", 0, first, scored)]
    points += [_point("fitted", size, _learned(splits, size), scored) for size in sizes]
    if arguments.microbench:
        _install(arguments.microbench, runs[0].gpu)
        rows = [_row(run, priors) for _, held in splits for run in held]
        points.append(_point("priors, own micro-benchmarks", 0, rows, scored))
    command = "python -m tests.bench.learning_curve " + " ".join(
        [*map(str, arguments.runs), "--engine", arguments.engine, "--sizes", arguments.sizes]
        + ["--by-model"] * arguments.by_model
    )
    write_text(Path(arguments.out), json.dumps({"command": command, "points": points}, indent=1))


Split = tuple[list[MeasuredRun], list[MeasuredRun]]
"""Runs to fit on, and runs held out."""


def _splits(runs: Sequence[MeasuredRun], *, by_model: bool) -> Iterator[Split]:
    ordered = most_different(runs, len(runs))
    if not by_model:
        yield [r for i, r in enumerate(ordered) if i % 3 != 1], ordered[1::3]
        return
    models = [load_model(run.model).name for run in ordered]
    for model in sorted(set(models)):
        pairs = list(zip(ordered, models, strict=True))
        yield [r for r, own in pairs if own != model], [r for r, own in pairs if own == model]


def _learned(splits: Sequence[Split], size: int) -> list[Row]:
    rows = []
    for fitted, held in splits:
        values = fit_constants(most_different(fitted, size)).values
        rows += [_row(run, values) for run in held]
    return rows


def _row(run: MeasuredRun, values: Mapping[str, float]) -> Row:
    return predict_run_with(run, calibrated(run, values))


def _point(title: str, num_runs: int, rows: Sequence[Row], scored: set[str]) -> dict[str, Any]:
    """Mean and largest error in percent of each metric over what was held out."""
    kept = [row for row in rows if row.run.run_id in scored]
    found = {
        name: np.abs([100 * (r.predicted[name] / r.run.measured[name] - 1) for r in having])
        for name in (*EVERYWHERE, *OPEN_LOOP)
        if (having := [r for r in kept if r.run.measured.get(name) and _counts(r.run, name)])
    }
    print(f"{title}, {num_runs} runs, {len(kept)} held out")  # noqa: T201
    for name, errors in found.items():
        print(  # noqa: T201
            f"  {name:18} n {len(errors):3}  mean {errors.mean():5.1f} %  "
            f"worst {errors.max():5.1f} %"
        )
    means = {name: round(float(errors.mean()), 2) for name, errors in found.items()}
    return {"num_runs": num_runs, "label": title, "mape_pct": means}


def _print_own_errors(runs: Sequence[MeasuredRun]) -> None:
    """Print by how much the measured figures themselves would vary: bootstrap over requests."""
    rng = np.random.default_rng(0)
    spreads: dict[str, list[float]] = {}
    for run in runs:
        if "requests_file" not in run.workload:
            continue
        with gzip.open(run.folder / str(run.workload["requests_file"]), "rt") as file:
            lines = [json.loads(line) for line in file]
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
        for name, (values, statistic) in statistics.items():
            if _counts(run, name):
                drawn = [
                    statistic(values[rng.integers(0, len(values), len(values))])
                    for _ in range(RESAMPLES)
                ]
                spread = float(100 * np.std(drawn) / statistic(values))
                spreads.setdefault(name, []).append(spread)
    print("bootstrap error of the measured figures, mean over the runs held out")  # noqa: T201
    for name, found in spreads.items():
        print(f"  {name:18} n {len(found):3}  {np.mean(found):5.1f} %")  # noqa: T201


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
