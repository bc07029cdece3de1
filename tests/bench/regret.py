"""What following the plan costs against trying it out: `python -m tests.bench.regret docs/regret`.

The folder holds workloads with an SLO, a design (the engine's default, the plan's first choice for
each workload, configurations spread over the space) and the runs measured so far, every
configuration under every workload. For each workload: goodput and SLO of the first choice, of the
default and of the best measured, and what a random search finds with as many runs on average.
`--missing` prints the commands that measure the rest.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from planner.measuring.runs import flat_metrics
from planner.tuning.pool import measured_goodput_per_s
from planner.workloads.workload import Workload, load_workload
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
    predicted_request_per_s: float
    request_per_s: float
    missed: tuple[str, ...]
    """Limits of the SLO that the run broke, with what it measured."""


def main() -> None:
    """Print the table, or what is still to be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--missing", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    design = [Entry(**entry) for entry in json.loads((folder / "design.json").read_text())]
    records = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    files = [p for p in sorted(folder.glob("*.json")) if p.name != "design.json"]
    workloads = {path: load_workload(str(path)) for path in files}
    if arguments.missing:
        click.echo("\n".join(_commands(design, records, workloads)))
        return
    for workload in workloads.values():
        runs = list(_measured(workload, design, records, folder))
        _print(workload, runs, design)


def _measured(
    workload: Workload, design: list[Entry], records: list[dict[str, Any]], folder: Path
) -> Iterator[Measured]:
    for record in records:
        entry = _entry_of(record, design)
        if entry is None or record["status"] != "ok" or not _is_of(record, workload):
            continue
        with gzip.open(folder / record["workload"]["requests_file"], "rt") as lines:
            requests = [json.loads(line) for line in lines]
        values = flat_metrics(record["measured"])
        yield Measured(
            entry=entry,
            goodput_per_s=measured_goodput_per_s(requests, workload.slo),
            predicted_request_per_s=record["predicted"]["request_per_s"]["value"],
            request_per_s=values["request_per_s"],
            missed=tuple(
                f"{name} {values[name]:.0f}"
                for name, limit in workload.slo.items()
                if values.get(name, 0.0) > limit
            ),
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
    best = max(runs, key=lambda run: (not run.missed, run.goodput_per_s))
    for run in sorted(runs, key=lambda run: -run.goodput_per_s):
        role = "first choice" if run.entry.first_choice_of == workload.name else ""
        role = role or ("default" if run.entry.name == "default" else "")
        knobs = " ".join(str(value) for value in list(run.entry.settings.values())[:5])
        click.echo(
            f"  {run.goodput_per_s:7.2f} requests/s within the SLO,"
            f" {100 * run.goodput_per_s / best.goodput_per_s:5.1f} % of the best;"
            f" {run.request_per_s:6.2f}/s in all, predicted {run.predicted_request_per_s:6.2f};"
            f" {knobs}; {role} {'MISSES ' + ', '.join(run.missed) if run.missed else ''}"
        )
    goodput = np.array([0.0 if run.missed else run.goodput_per_s for run in runs])
    rng = np.random.default_rng(0)
    for count in (n for n in RANDOM_RUNS if n < len(runs)):
        tried = np.array([rng.permutation(len(runs))[:count] for _ in range(DRAWS)])
        found = goodput[tried].max(axis=1).mean() / max(goodput.max(), 1e-9)
        click.echo(f"  a random search of {count} runs finds {100 * found:.1f} % of the best")


def _commands(
    design: list[Entry], records: list[dict[str, Any]], workloads: Mapping[Path, Workload]
) -> Iterator[str]:
    gpu = records[0]["gpu"]
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
                f"planner measure --backend vllm --gpu {gpu} --random-weights --repeats 1 "
                f"{files} {settings}"
            )


if __name__ == "__main__":
    run_bench(main)
