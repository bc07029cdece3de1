"""Fits only some of an engine's constants: `python -m tests.bench.refit OUT.json RUNS.jsonl...`.

Where the form of a term has changed, what belongs to it is fitted anew and all else stays as it is
shipped. `--parts` says what: `launches` (of steps with prompts), `front_end`, or both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import click

from cost_models.calibration_io import load_calibration, read_engine_file
from cost_models.profile_io import load_gpu
from planner.calibration.constants import LAUNCHES, Constant, Part, fitted_constants, with_constants
from planner.calibration.fit import fit_constants
from planner.measuring.runs import MeasuredRun, read_runs
from tests.bench import run_bench


def main() -> None:
    """Print the constants with their errors; write the engine's file with these in it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--parts", nargs="+", default=["launches", "front_end"])
    arguments = parser.parse_args()
    runs = [
        run
        for path in arguments.runs
        for run, _, _ in read_runs(path)
        if run is not None and run.measured and run.protocol != "capacity"
    ]
    fit = fit_constants(runs, priors=_table(runs, arguments.parts))
    click.echo("\n".join(fit.lines()))
    content = read_engine_file(runs[0].engine)
    known = load_calibration(load_gpu(runs[0].gpu), runs[0].engine)
    fitted = with_constants(known, fit.values)
    for name in fit.values:
        part = "step" if hasattr(fitted.step, name) else "front_end"
        content[part][name] = float(f"{getattr(getattr(fitted, part), name):.6g}")
        content["relative_errors"][name] = round(fit.relative_errors[name], 4)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def _table(runs: list[MeasuredRun], parts: list[str]) -> dict[str, Constant]:
    """Return the constants of the asked parts that the engine's form has."""
    found = fitted_constants(read_engine_file(runs[0].engine))
    return {
        name: constant
        for name, constant in found.items()
        if (name in LAUNCHES and "launches" in parts)
        or (constant.part is Part.FRONT_END and "front_end" in parts)
    }


if __name__ == "__main__":
    run_bench(main)
