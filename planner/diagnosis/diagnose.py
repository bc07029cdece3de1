"""The use case: find a run, learn what is known of it, and say what is wrong and why."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cost_models.errors import ConfigError, PlannerError, ProfileError
from planner.diagnosis.case import RunCase
from planner.diagnosis.causes import CAUSES
from planner.diagnosis.complaints import complaints_of
from planner.diagnosis.finding import Diagnosis, ranked
from planner.diagnosis.prospect import Prospect, prospect_of
from planner.diagnosis.request_log import RequestLog
from planner.workloads.measured import MeasuredRun, parse_run
from planner.workloads.model import check_slo


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """What a run had to keep."""

    slo: Mapping[str, float] = field(default_factory=dict)
    """In the units of the metric's name."""
    max_quality_loss_pct: float | None = None


def diagnose(
    run: str,
    *,
    store: str = "",
    slo: Mapping[str, float] | None = None,
    max_quality_loss_pct: float | None = None,
) -> list[Diagnosis]:
    """Return what is wrong with a measured run, and why; of a runs file, of each of its runs.

    Args:
        run: A runs file, `FILE:ID` or `FILE:LINE` for one of its runs, or a run id of the store
            or the beginning of one.
        store: Where the id is looked up.
        slo: Limits that the run had to keep, by metric.
        max_quality_loss_pct: Loss that was allowed beside the published checkpoint.

    Raises:
        PlannerError: No such run or file, or an SLO on a metric that the run does not have.
    """
    allowed = check_slo(slo or {}, "--slo")
    limits = RunLimits(slo=allowed, max_quality_loss_pct=max_quality_loss_pct)
    path, chosen = _file_and_choice(run)
    if path is not None:
        return _of_file(path, chosen, limits)
    with _exported(store, run) as (folder, record, others):
        return [diagnose_record(record, folder=folder, others=others, limits=limits)]


def diagnose_record(
    record: Mapping[str, Any],
    *,
    folder: Path,
    others: Sequence[Mapping[str, Any]] = (),
    limits: RunLimits | None = None,
) -> Diagnosis:
    """Return the diagnosis of one line of a runs file.

    Args:
        record: The line.
        folder: Where its requests file lies.
        others: Lines beside it, that it is compared with.
        limits: What the run had to keep.
    """
    case = _case(record, folder, others, limits or RunLimits())
    complaints = complaints_of(case)
    findings = tuple(f for cause in CAUSES.values() if (f := cause(case)) is not None)
    return Diagnosis(
        run_id=case.run.run_id,
        status=case.status,
        complaints=complaints,
        findings=ranked(findings, complaints),
        not_predicted=case.not_predicted,
    )


def _of_file(path: Path, chosen: str, limits: RunLimits) -> list[Diagnosis]:
    records = _records(path)
    wanted = [record for number, record in enumerate(records, 1) if _is(record, number, chosen)]
    if not wanted:
        raise ConfigError(f"{path}: no run is called {chosen}", hint="give its id or its line")
    return [
        diagnose_record(record, folder=path.parent, others=records, limits=limits)
        for record in wanted
    ]


def _file_and_choice(run: str) -> tuple[Path | None, str]:
    """Return the runs file that a text names, and which of its runs; None: it is an id."""
    if Path(run).is_file():
        return Path(run), ""
    name, colon, chosen = run.rpartition(":")
    if colon and Path(name).is_file():
        return Path(name), chosen
    if run.endswith((".jsonl", ".json")):
        raise ProfileError(f"{run}: no such file")
    return None, run


def _is(record: Mapping[str, Any], number: int, chosen: str) -> bool:
    run_id = str(record.get("run_id"))
    return not chosen or chosen == str(number) or run_id.startswith(chosen)


def _records(path: Path) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: not a runs file ({error})") from None


@contextmanager
def _exported(
    store: str, run_id: str
) -> Iterator[tuple[Path, Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Yield a stored run as a file's, with its requests beside it, and the store's other runs."""
    from planner.measuring.measure import export_runs, list_runs, show_run  # noqa: PLC0415

    found = show_run(store, run_id)
    with tempfile.TemporaryDirectory(prefix="planner-diagnose-") as name:
        path = export_runs(store, name, [found.run_id])
        others = [run.record for run in list_runs(store) if "requests_file" not in run.record]
        yield path.parent, _records(path)[0], others


def _case(
    record: Mapping[str, Any],
    folder: Path,
    others: Sequence[Mapping[str, Any]],
    limits: RunLimits,
) -> RunCase:
    run = parse_run(record, folder)
    prospect, why_not = _prospect(run)
    return RunCase(
        record=record,
        run=run,
        log=_log(run),
        prospect=prospect,
        not_predicted=why_not,
        slo=limits.slo,
        max_quality_loss_pct=limits.max_quality_loss_pct,
        siblings=_siblings(record, others, folder),
    )


def _prospect(run: MeasuredRun) -> tuple[Prospect | None, str]:
    try:
        return prospect_of(run), ""
    except PlannerError as error:
        return None, error.message


def _log(run: MeasuredRun) -> RequestLog | None:
    name = run.workload.get("requests_file")
    if not name:
        return None
    path = run.folder / str(name)
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        return RequestLog.of(json.loads(line) for line in text.splitlines())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"{path}: not a requests file ({error!r})") from None


def _siblings(
    record: Mapping[str, Any], others: Sequence[Mapping[str, Any]], folder: Path
) -> list[MeasuredRun]:
    """Return the other good runs of the same model, GPU and engine."""
    same = ("model", "gpu", "engine")
    found = []
    for other in others:
        is_alike = all(other.get(name) == record.get(name) for name in same)
        is_other = other.get("run_id") != record.get("run_id")
        if is_alike and is_other and (other.get("status") or "ok") == "ok":
            found.append(parse_run(other, folder))
    return found
