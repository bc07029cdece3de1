"""Writes the folder of a plan: plan.json, and the files that its engine is given."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cost_models.errors import ProfileError
from engines.base import SampledLoad
from engines.registry import find_engine, list_engines
from planner.workloads.demand import workload_demand

if TYPE_CHECKING:
    from planner.plans.plan import Plan
    from planner.question import Problem
    from planner.workloads.model import Workload

SAMPLED_REQUESTS = 500
"""Requests that an engine's own benchmark can be given."""


def write_plan_files(
    plan: Plan, *, problem: Problem, folder: Path, seed: int = 0
) -> tuple[str, ...]:
    """Write plan.json and the files that deploy it, all or nothing, and return their names.

    An engine without files of its own is run by `planner measure`.

    Raises:
        ProfileError: The folder holds files that are not a plan's.
        ConfigError: The configuration cannot be written for the engine.
    """
    engine = find_engine(problem.rules.name)
    contents = {"plan.json": json.dumps(plan.to_json(), indent=2, allow_nan=False) + "\n"}
    contents |= engine.plan_files(
        plan.recommended.deployment, problem.model, sampled_load(problem.workload, seed=seed)
    )
    _check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, text in contents.items():
            _write(staging / name, text)
        folder.mkdir(exist_ok=True)
        for name in contents:
            os.replace(staging / name, folder / name)
        for stale in _names_of_files() - set(contents):
            (folder / stale).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return tuple(contents)


def sampled_load(workload: Workload, *, seed: int = 0) -> SampledLoad:
    """Return requests of a workload, as an engine's own benchmark takes them."""
    requests = workload_demand(workload, seed=seed, num_requests=SAMPLED_REQUESTS).requests
    return SampledLoad(
        isl=requests.isl.tolist(),
        osl=np.minimum(requests.osl, workload.max_output_tokens).tolist(),
        concurrency=workload.arrival.concurrency,
        rng=np.random.default_rng([seed, 2]),
    )


def _names_of_files() -> set[str]:
    """Return the names of the files of any engine: a folder may have held another's plan."""
    return {name for engine in list_engines() for name in find_engine(engine).plan_file_names}


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ProfileError(f"--out {folder}: not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "plan.json").is_file():
        raise ProfileError(
            f"--out {folder}: holds files that are not a plan's", hint="name a new or empty folder"
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    if path.suffix == ".sh":
        path.chmod(0o755)
