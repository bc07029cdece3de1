"""The one place where the interface meets calibration: fit, validate, and the user's own files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.validation.validate import Validation

Progress = Callable[[int, int], None]


def own_calibrations(folder: Path) -> dict[str, str]:
    """Return the user's calibration files by engine."""
    return {path.stem: str(path) for path in sorted(folder.glob("*.json"))}


def runs_file(source: str) -> str:
    """Return a runs file: the source itself, or what a store exports to a new folder.

    Raises:
        ProfileError: There is no such file, or the store holds no run that ended well.
    """
    from cost_models.errors import ProfileError  # noqa: PLC0415

    path = Path(source).expanduser()
    if "://" not in source and not path.is_file():
        raise ProfileError(f"{source}: no such file")
    if not is_store(source):
        return str(path)
    from planner.measuring.measure import export_runs  # noqa: PLC0415  SQLAlchemy

    return str(export_runs(source, tempfile.mkdtemp(prefix="planner-runs-")))


def is_store(source: str) -> bool:
    """Return whether runs come from a store and not from a file of JSON lines."""
    return "://" in source or Path(source).suffix in (".db", ".sqlite")


def run_and_store(source: str, run_id: str) -> tuple[str, str]:
    """Return a run as `planner diagnose` takes it, and its store if it has one."""
    if is_store(source):
        return run_id, source
    # What could not be read is called by its line.
    return f"{Path(source).expanduser()}:{run_id.removeprefix('line ')}", ""


def failed_runs(source: str) -> list[tuple[str, str]]:
    """Return the runs of a store that did not end well, with why; files name theirs themselves."""
    if not is_store(source):
        return []
    from planner.measuring.measure import list_runs  # noqa: PLC0415  SQLAlchemy

    records = [run.record for run in list_runs(source)]
    return [
        (str(record["run_id"]), _why_failed(record))
        for record in records
        if (record.get("status") or "ok") != "ok"
    ]


def _why_failed(record: Mapping[str, Any]) -> str:
    said = str(record.get("error") or "").strip().splitlines()
    return f"{record['status']}: {said[0]}" if said else str(record["status"])


def fit(path: str, *, engine: str, out: str, progress: Progress) -> list[str]:
    """Fit an engine's constants on the runs of a file and return what was found, in words."""
    from planner.calibration.runs import calibrate_runs  # noqa: PLC0415  SciPy

    return calibrate_runs([runs_file(path)], engine=engine, out=out, progress=progress)


def validated(
    path: str, calibrations: Mapping[str, str], *, progress: Progress = lambda _done, _n: None
) -> Validation:
    """Predict every run of a file, those of each engine under its own calibration."""
    from cost_models.errors import PlannerError  # noqa: PLC0415
    from planner.validation.validate import Validation, predict_run  # noqa: PLC0415
    from planner.workloads.measured import read_runs  # noqa: PLC0415

    rows, skipped = [], failed_runs(path)
    runs = list(read_runs(runs_file(path)))
    for done, (run, run_id, reason) in enumerate(runs):
        progress(done, len(runs))
        if run is None:
            skipped.append((run_id, reason))
            continue
        try:
            rows.append(predict_run(run, calibration=calibrations.get(run.engine, "")))
        except PlannerError as error:
            skipped.append((run_id, str(error)))
    return Validation(rows=tuple(rows), skipped=tuple(skipped))
