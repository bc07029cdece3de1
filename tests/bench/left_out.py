"""What is left out, and how sure it is: `python -m tests.bench.left_out RUNS.jsonl ... --out FILE`.

Fits the engine's constants with each group of runs left out in turn (the runs of one load, where
eight were measured under it; else those of one model) and predicts it. Prints the errors, and how
often 90 % intervals made of the other groups held each group, by metric and kind of load. `FILE`
gets the intervals; `--into CALIBRATION` also writes them into a file of constants.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cost_models.profile_io import load_model
from engines.registry import engine_constants
from planner.calibration.constants import fitted_constants
from planner.calibration.intervals import fold_intervals, left_out_coverage
from planner.calibration.runs import fitted_and_left_out
from planner.files import write_text
from planner.validation.validate import Row, errors_by_metric
from planner.workloads.measured import MeasuredRun
from tests.bench import run_bench
from tests.bench.learning_curve import read_serving_runs

SHOWN = (
    "tpot_ms.mean", "tpot_ms.p99", "output_tok_per_s", "e2el_ms.p50", "e2el_ms.p99",
    "ttft_ms.mean", "ttft_ms.p50", "ttft_ms.p99", "itl_ms.p99",
)  # fmt: skip

FEWEST_OF_A_LOAD = 8
"""Runs of one load that are a group of their own."""


def main() -> None:
    """Print errors and coverage; write the intervals."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--into", default="", metavar="CALIBRATION")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="planner-left-out-")
    runs = read_serving_runs(arguments.runs, arguments.engine)
    priors = fitted_constants(engine_constants(arguments.engine))
    checked = fitted_and_left_out(runs, priors=priors, folds=groups_of(runs))
    for stage, seconds in checked.seconds.items():
        _print(f"{stage}: {seconds:.0f} s")
    for name in dict.fromkeys(checked.folds):
        _print_errors(name, checked.of_fold(name))
    for kind in sorted({row.regime for row in checked.left_out}):
        _print_errors(kind, [row for row in checked.left_out if row.regime == kind])
    coverage = left_out_coverage(checked.left_out, checked.folds)
    for key, (count, share) in coverage.items():
        if key.rpartition("/")[2] in SHOWN:
            _print(f"{key:44} n {count:3}  held {100 * share:3.0f} %")
    intervals = {
        key: asdict(found) for key, found in fold_intervals(checked.left_out, checked.folds).items()
    }
    write_text(Path(arguments.out), json.dumps({"intervals": intervals}, indent=1) + "\n")
    if arguments.into:
        path = Path(arguments.into)
        content = json.loads(path.read_text(encoding="utf-8"))
        write_text(path, json.dumps(content | {"intervals": intervals}, indent=1) + "\n")


def groups_of(runs: Sequence[MeasuredRun]) -> list[str]:
    """Return what each run is left out together with."""
    loads = [_load(run) for run in runs]
    counts = Counter(loads)
    return [load if counts[load] >= FEWEST_OF_A_LOAD else load.partition(",")[0] for load in loads]


def _load(run: MeasuredRun) -> str:
    load = run.load()
    asked = load.concurrency or run.workload.get("rate_per_s")
    lengths = f"{load.isl.mean:.0f} in {load.osl.mean:.0f} out"
    return f"{load_model(run.model).name}, {run.protocol} {asked} {lengths}"


def _print_errors(title: str, rows: Sequence[Row]) -> None:
    found = errors_by_metric(rows)
    words = (
        f"{name} {found[name].mape_pct:.1f} ({found[name].bias_pct:+.1f})"
        for name in SHOWN
        if name in found
    )
    _print(f"{title}: {len(rows)} runs, " + ", ".join(words))


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    run_bench(main)
