"""What following the plan costs against trying it out: `python -m tests.bench.regret docs/regret`.

The folder holds workloads with an SLO, a design (the engine's default, the plan's first choice for
each workload, configurations spread over the space) and the runs measured so far, every
configuration under every workload. For each workload: goodput and SLO of the first choice, of the
default and of the best measured, and what a random search finds with as many runs on average.

The first choice was fixed before the runs, by the constants of its day. Beside it stands what the
calibration in force would choose among the measured configurations (each simulated under the
workload file, and compared as a plan compares its finalists), what that choice costs, and the rank
correlation of predicted and measured goodput. `--calibration FILE` asks another calibration.
`--missing` prints the commands that measure the rest.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from engines.registry import as_run
from planner.percent import probability_words
from planner.plans.decide import Finalist
from planner.prediction.predict import predict_deployment
from planner.question import Problem, load_problem
from planner.search.study import evaluated
from planner.tuning.pool import measured_goodput_per_s
from planner.workloads.demand import workload_demand
from planner.workloads.measured import flat_metrics, parse_run
from planner.workloads.model import Workload
from planner.workloads.workload import load_workload
from tests.bench import run_bench

RANDOM_RUNS = (1, 4, 8, 16)
DRAWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One configuration of the design."""

    name: str
    settings: Mapping[str, Any]
    first_choice_of: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One configuration under one workload."""

    entry: Entry
    goodput_per_s: float
    request_per_s: float
    missed: tuple[str, ...]
    """Limits of the SLO that the run broke, with what it measured."""
    predicted: Finalist
    """What the calibration in force makes of it."""

    @property
    def rank(self) -> tuple[bool, float]:
        """What is best among the measured: the SLO first."""
        return not self.missed, self.goodput_per_s


def main() -> None:
    """Print the table, or what is still to be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--calibration", default="")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    design = [Entry(**entry) for entry in json.loads((folder / "design.json").read_text())]
    records = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    files = [p for p in sorted(folder.glob("*.json")) if p.name != "design.json"]
    workloads = {path: load_workload(str(path)) for path in files}
    if arguments.missing:
        click.echo("\n".join(_commands(design, records, workloads)))
        return
    for path, workload in workloads.items():
        ours = [r for r in records if r["status"] == "ok" and _is_of(r, workload)]
        runs = list(_measured(ours, design, path, arguments.calibration))
        _print(workload, runs, design)


def _measured(
    records: list[dict[str, Any]], design: list[Entry], workload: Path, calibration: str
) -> Iterator[Measured]:
    """Yield the runs of one workload, each beside what is predicted of its configuration."""
    for record in records:
        entry = _entry_of(record, design)
        if entry is None:
            continue
        problem = load_problem(
            gpu=record["gpu"],
            workload=str(workload),
            engine=record["engine"],
            calibration=calibration,
        )
        with gzip.open(workload.parent / record["workload"]["requests_file"], "rt") as lines:
            requests = [json.loads(line) for line in lines]
        values = flat_metrics(record["measured"])
        yield Measured(
            entry=entry,
            goodput_per_s=measured_goodput_per_s(requests, problem.slo),
            request_per_s=values["request_per_s"],
            missed=tuple(
                f"{name} {values[name]:.0f}"
                for name, limit in problem.slo.items()
                if values.get(name, 0.0) > limit
            ),
            predicted=_predicted(record, problem, workload.parent),
        )


def _predicted(record: dict[str, Any], problem: Problem, folder: Path) -> Finalist:
    """Return a configuration as the plan of its workload would see it: it knows no run."""
    run = parse_run(record, folder)
    config = as_run(run.engine_config(), run.engine)
    objective, evaluator = problem.workload.objective, problem.evaluator
    deployment = run.deployment(config, problem.gpu)
    return Finalist(
        candidate=evaluated(deployment, evaluator, objective=objective),
        prediction=predict_deployment(evaluator, deployment, workload_demand(problem.workload)),
        objective=objective,
    )


def _entry_of(record: Mapping[str, Any], design: list[Entry]) -> Entry | None:
    config = record["config"]
    for entry in design:
        if all(config[knob] == value for knob, value in entry.settings.items()):
            return entry
    return None


def _is_of(record: Mapping[str, Any], workload: Workload) -> bool:
    asked, arrival = record["workload"], workload.arrival
    return (asked["protocol"], asked.get("concurrency", 0), asked["num_requests"]) == (
        str(arrival.protocol),
        arrival.concurrency,
        arrival.num_requests,
    )


def _print(workload: Workload, runs: list[Measured], design: list[Entry]) -> None:
    limits = ", ".join(f"{name} <= {limit:g}" for name, limit in workload.slo.items())
    click.echo(
        f"\n{workload.title} ({limits}): {len(runs)} of {len(design)} configurations measured"
    )
    if not runs:
        return
    best = max(runs, key=lambda run: run.rank)
    chosen = reduce(lambda a, b: b if b.predicted.beats(a.predicted) else a, runs)
    for run in sorted(runs, key=lambda run: -run.goodput_per_s):
        roles = [
            *(["first choice"] if run.entry.first_choice_of == workload.name else []),
            *(["default"] if run.entry.name == "default" else []),
            *(["today's choice"] if run is chosen else []),
        ]
        click.echo(_line(run, best, roles))
    _print_ranking(runs, chosen, best)
    _print_random_search(runs)


def _line(run: Measured, best: Measured, roles: list[str]) -> str:
    knobs = " ".join(str(value) for value in list(run.entry.settings.values())[:5])
    return (
        f"  {run.goodput_per_s:7.2f} requests/s within the SLO,"
        f" {100 * run.goodput_per_s / best.goodput_per_s:5.1f} % of the best;"
        f" {run.request_per_s:6.2f}/s in all; predicted {run.predicted.value:6.2f} within the SLO"
        f"{'' if run.predicted.prediction.feasible else ', which it misses'}"
        f" (holds with {probability_words(run.predicted.prediction.probability)});"
        f" {knobs}; {', '.join(roles)} {'MISSES ' + ', '.join(run.missed) if run.missed else ''}"
    )


def _print_ranking(runs: list[Measured], chosen: Measured, best: Measured) -> None:
    """Say what today's choice among the measured costs, and how well all are ranked."""
    share = 100 * chosen.goodput_per_s / best.goodput_per_s
    goodputs = [[run.predicted.value, run.goodput_per_s] for run in runs]
    ranks = spearmanr(goodputs)
    click.echo(
        f"  today's choice among the measured: {share:.1f} % of the best,"
        f" {'misses the SLO' if chosen.missed else 'meets the SLO'};"
        f" rank correlation {ranks.statistic:.2f} (p {ranks.pvalue:.3f}, n {len(runs)})"
    )


def _print_random_search(runs: list[Measured]) -> None:
    goodput = np.array([0.0 if run.missed else run.goodput_per_s for run in runs])
    rng = np.random.default_rng(0)
    for count in (n for n in RANDOM_RUNS if n < len(runs)):
        tried = np.array([rng.permutation(len(runs))[:count] for _ in range(DRAWS)])
        found = goodput[tried].max(axis=1).mean() / max(goodput.max(), 1e-9)
        click.echo(f"  a random search of {count} runs finds {100 * found:.1f} % of the best")


def _commands(
    design: list[Entry], records: list[dict[str, Any]], workloads: Mapping[Path, Workload]
) -> Iterator[str]:
    for entry in design:
        left = [
            path
            for path, workload in workloads.items()
            if not any(
                _entry_of(r, design) == entry and _is_of(r, workload)
                for r in records
                if r["status"] == "ok"
            )
        ]
        if left:
            settings = " ".join(f"--set {knob}={value}" for knob, value in entry.settings.items())
            files = " ".join(f"--workload {path}" for path in left)
            yield (
                f"planner measure --backend vllm --gpu {records[0]['gpu']} --random-weights "
                f"--repeats 1 {files} {settings}"
            )


if __name__ == "__main__":
    run_bench(main)
