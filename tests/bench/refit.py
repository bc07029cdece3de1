"""Fits only some of an engine's constants: `python -m tests.bench.refit OUT.json RUNS.jsonl...`.

Where the form of a term has changed, what belongs to it is fitted anew and all else stays as it is
shipped. `--parts` says what: `launches` (of steps with prompts), `front_end`, and `step` for what
else serving runs without drafts tell of one GPU. Constants that other measurements told, as the
host's floor, stay as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import click

from cost_models.profile_io import load_gpu
from engines.registry import engine_constants, load_calibration
from planner.calibration.constants import (
    CONSTANTS,
    LAUNCHES,
    Constant,
    Part,
    fitted_constants,
    with_constants,
)
from planner.calibration.fit import fit_constants
from planner.workloads.measured import MeasuredRun, read_runs
from tests.bench import run_bench

TOLD_ELSEWHERE = frozenset(
    {
        "host_floor_s", "host_floor_per_sequence_s", "synchronous_host_s",
        "synchronous_host_per_sequence_s", "draft_pass_s", "draft_layer_s", "drafting_layer_pass_s",
        "piecewise_decode_layer_s", "tp_gap_s", "eager_layer_tp_s",
    }
)  # fmt: skip
"""Constants that runs of small models, of drafts and of several GPUs told."""


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
    content = engine_constants(runs[0].engine)
    known = load_calibration(load_gpu(runs[0].gpu), runs[0].engine)
    fitted = with_constants(known, fit.values)
    for name in fit.values:
        part = CONSTANTS[name].part
        if part is Part.FAMILY_SCALE:
            held, found = content["step"]["family_scale"], fitted.step.family_scale[name]
        else:
            held, found = content[part], getattr(getattr(fitted, part), name)
        held[name] = float(f"{found:.6g}")
        content["relative_errors"][name] = round(fit.relative_errors[name], 4)
    told = [name for name in content["not_told"] if name not in fit.values]
    content["not_told"] = [*told, *fit.not_told]
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def _table(runs: list[MeasuredRun], parts: list[str]) -> dict[str, Constant]:
    """Return the constants of the asked parts that the engine's form has."""
    found = fitted_constants(engine_constants(runs[0].engine))
    return {
        name: constant
        for name, constant in found.items()
        if name not in TOLD_ELSEWHERE and _part_of(name, constant) in parts
    }


def _part_of(name: str, constant: Constant) -> str:
    """Return what `--parts` calls the part that a constant belongs to."""
    if name in LAUNCHES:
        return "launches"
    return "front_end" if constant.part is Part.FRONT_END else "step"


if __name__ == "__main__":
    run_bench(main)
