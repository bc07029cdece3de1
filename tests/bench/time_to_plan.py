"""From a GPU that nobody has measured to a calibrated plan: `python -m tests.bench.time_to_plan`.

Runs the commands that a user would run, on a host with that GPU and the engine, and prints the wall
time of each: micro-benchmarks, operators fitted on them, served workloads, constants fitted on
those, and the plan. Nothing that the user has calibrated before is used or changed. `--work DIR`
keeps the tables, the runs and what was calibrated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

Stage = tuple[str, list[str]]
"""Name, and the arguments of `planner`."""


def main() -> None:
    """Print each stage's command and wall time; end with the plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", required=True, help="profile name, or a YAML file of a new one")
    parser.add_argument("--backend", default="vllm")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--workload", action="append", required=True, help="the first is planned")
    parser.add_argument("--set", action="append", default=[], help="knob=value of what is measured")
    parser.add_argument("--repeats", default="1")
    parser.add_argument("--work", type=Path, help="default: a folder that is removed at the end")
    arguments = parser.parse_args()
    if arguments.work:
        arguments.work.mkdir(parents=True)
        _time(arguments, arguments.work)
        return
    with tempfile.TemporaryDirectory(prefix="time-to-plan-") as folder:
        _time(arguments, Path(folder))


def _time(arguments: argparse.Namespace, folder: Path) -> None:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
    total_s = 0.0
    for name, command in _stages(arguments, folder):
        start_s = time.perf_counter()
        _run(command, environment)
        took_s = time.perf_counter() - start_s
        total_s += took_s
        click.echo(f"{name:42} {took_s:8.1f} s   planner {' '.join(command)}")
    click.echo(f"{'in all':42} {total_s:8.1f} s")


def _stages(arguments: argparse.Namespace, folder: Path) -> Iterator[Stage]:
    tables, store = str(folder / "tables"), str(folder / "runs.db")
    gpu = ["--gpu", arguments.gpu]
    workloads = [part for name in arguments.workload for part in ("--workload", name)]
    settings = [part for setting in arguments.set for part in ("--set", setting)]
    yield "kernels timed", ["microbench", tables, *gpu]
    yield "operators fitted", ["calibrate", "--microbench", tables, *gpu, "--install"]
    yield (
        "workloads served",
        ["measure", "--backend", arguments.backend, *gpu, *workloads, *settings, "--random-weights",
         "--repeats", arguments.repeats, "--store", store],
    )  # fmt: skip
    yield (
        "constants fitted",
        ["calibrate", "--store", store, "--engine", arguments.engine, "--install"],
    )
    yield (
        "plan",
        ["plan", *gpu, "--engine", arguments.engine, "--workload", arguments.workload[0]],
    )


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner", *command],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # A plan may find nothing feasible: that, too, is an answer.
    accepted = (0, 1) if command[0] == "plan" else (0,)
    if done.returncode not in accepted:
        sys.exit(f"planner {' '.join(command)} ended with {done.returncode}\n{done.stderr}")
    if command[0] == "plan":
        click.echo(done.stdout)


if __name__ == "__main__":
    main()
