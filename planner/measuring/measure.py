"""The use cases around measuring: measure a plan or a configuration, keep and compare runs.

The executor measures; here plans, workloads and predictions become cases for it.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cost_models.errors import PlannerError, ProfileError
from cost_models.profile_io import load_gpu
from engines.registry import is_engine, load_calibration
from executor.backend import Availability, load_backend
from executor.backend import backend_names as installed_backends
from executor.case import Case, Measurement, MeasureOptions, PhaseLimits, Tools
from executor.machine import NvmlReader
from executor.measure import measure_together
from executor.microbench.run import (
    CALIBRATION_FAMILIES,
    Microbench,
    microbench,
    write_tables,
)
from executor.repeats import RepeatRule, repeats_section
from executor.store import RunStore, StoredRun
from planner.local_gpu import local_gpu, profile_name
from planner.measuring.cases import cases_of
from planner.measuring.request import COMPARED_METRICS, MeasureRequest
from planner.own_calibrations import files_in_force
from planner.validation.drift import Watched, drift_lines, drifts
from planner.workloads.measured import flat_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendState:
    """One line of `planner doctor`."""

    name: str
    availability: Availability


def measure_request(request: MeasureRequest) -> list[Measurement]:
    """Measure every case of a request and return what is known of each.

    Cases that deploy the same share one start of the engine. The time budget is shared by the
    cases; one that was measured before takes none.

    Raises:
        PlannerError: Bad input, or a store that takes nothing. What an engine does wrong is a
            stored run.
    """
    backend = load_backend(request.backend)
    workloads = (request.workload, *request.more_workloads)
    cases = [c for w in workloads for c in cases_of(replace(request, workload=w), backend)]
    groups = _by_deployment(cases)
    store = RunStore(request.store)
    until_s = time.monotonic() + request.time_budget_s
    results = []
    try:
        for number, group in enumerate(groups):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            tools = Tools(
                backend=backend,
                store=store,
                reader=NvmlReader(group[0].deployment.config.num_gpus),
                options=_options(request, left_s / (len(groups) - number)),
                progress=_progress(request, f"{number + 1}/{len(groups)}"),
                observe=request.observe,
            )
            results += measure_together(group, tools)
    finally:
        store.close()
    return results


def _by_deployment(cases: Sequence[Case]) -> list[list[Case]]:
    """Group the cases that deploy the same, in order of their first."""
    groups: list[list[Case]] = []
    for case in cases:
        same = (group for group in groups if group[0].deployment == case.deployment)
        group = next(same, None)
        if group is None:
            groups.append([case])
        else:
            group.append(case)
    return groups


def measured_drift(results: Sequence[Measurement], *, store: str) -> list[str]:
    """Say which runs lie far outside what was predicted before them, and what to do about it."""
    records = [
        record
        for result in results
        for record in result.records
        if record["status"] == "ok" and record.get("predicted") and is_engine(record["engine"])
    ]
    gpus = {str(record["engine"]): str(record["gpu"]) for record in records}

    def known(engine: str) -> Sequence[str]:
        gpu = load_gpu(gpus[engine])
        own = files_in_force("", gpu=gpu.name, engine=engine)
        return load_calibration(gpu, engine, own).seen_versions

    return drift_lines([_watched(record) for record in records], known, source=f"--store {store}")


def _watched(record: Mapping[str, Any]) -> Watched:
    predicted = {
        name: (said["value"], (said["interval_90"][0], said["interval_90"][1]))
        for name, said in record["predicted"].items()
    }
    return Watched(
        engine=str(record["engine"]),
        engine_version=str(record.get("engine_version") or ""),
        drifts=tuple(drifts(record["run_id"], flat_metrics(record["measured"]), predicted)),
    )


def list_runs(store: str) -> list[StoredRun]:
    """Return all runs of a store, oldest first."""
    with closing(RunStore(store, must_exist=True)) as opened:
        return opened.runs()


def show_run(store: str, run_id: str) -> StoredRun:
    """Return one run by its id or the beginning of it."""
    with closing(RunStore(store, must_exist=True)) as opened:
        return opened.run(run_id)


def export_runs(store: str, out: str, run_ids: Sequence[str] = ()) -> Path:
    """Write runs and their requests as files that `planner validate` reads.

    By default these are all that ended well: what failed has no metrics to be scored on.

    Returns:
        The runs file; each run's requests lie beside it.

    Raises:
        ProfileError: Nothing to write, or the folder cannot be written.
    """
    good = [run for run in list_runs(store) if run.status == "ok"]
    chosen = [show_run(store, run_id) for run_id in run_ids] or good
    if not chosen:
        raise ProfileError(f"store {store}: holds no runs that ended well")
    path = Path(out)
    path = path if path.suffix == ".jsonl" else path / "runs.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_exported(run, path.parent)) for run in chosen]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def compare_runs(first: StoredRun, second: StoredRun) -> list[tuple[str, float, float]]:
    """Return the metrics that both runs have: name, first, second."""
    one = flat_metrics(first.record.get("measured") or {})
    two = flat_metrics(second.record.get("measured") or {})
    return [
        (name, one[name], two[name]) for name in COMPARED_METRICS if name in one and name in two
    ]


def measurement_to_json(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement in the documented JSON form."""
    return {
        "key": measurement.key,
        "ok": measurement.is_ok,
        "num_resumed": measurement.num_resumed,
        "repeats": repeats_section(measurement.measured),
        "runs": list(measurement.records),
    }


def run_microbench(
    *,
    out: str,
    gpu: str = "",
    time_budget_s: float = 300.0,
    device: str = "",
    families: Sequence[str] = CALIBRATION_FAMILIES,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Microbench, list[Path]]:
    """Time kernels on this machine and write their tables.

    Args:
        out: Folder for the tables, which `planner validate --operators` and `planner calibrate
            --operators` read.
        gpu: Profile, or file of one, whose name their `system` column takes; by default this
            machine's.
        time_budget_s: For everything.
        device: `cuda` or `cpu`; by default the GPU where there is one.
        families: What is timed; by default what a calibration takes.
        progress: Told what is timed, and the seconds left.

    Raises:
        MeasurementError: No torch, no such device or family, or nothing that can be timed.
        ProfileError: A GPU without a profile, or a folder that cannot be written.
    """
    result = microbench(
        system=profile_name(gpu) if gpu else local_gpu(),
        time_budget_s=time_budget_s,
        device=device,
        families=families,
        progress=progress,
    )
    try:
        return result, write_tables(result, Path(out))
    except OSError as error:
        raise ProfileError(f"{out}: cannot be written ({error.strerror})") from None


def doctor() -> list[BackendState]:
    """Return every backend and whether it can run here."""
    states = []
    for name in installed_backends():
        try:
            found = load_backend(name).availability()
        except PlannerError as error:
            found = Availability(can_run=False, problem=error.message)
        states.append(BackendState(name=name, availability=found))
    return states


def _options(request: MeasureRequest, budget_s: float) -> MeasureOptions:
    rule = RepeatRule()
    if request.repeats:
        rule = replace(rule, least=request.repeats, most=request.repeats)
    return MeasureOptions(
        limits=PhaseLimits(), rule=rule, time_budget_s=budget_s, seed=request.seed
    )


def _progress(request: MeasureRequest, case: str) -> Callable[[str, float], None]:
    show = request.progress
    if show is None:
        return lambda _what, _left_s: None
    return lambda what, left_s: show(f"case {case}: {what}", left_s)


def _exported(run: StoredRun, folder: Path) -> dict[str, Any]:
    """Write a run's requests and return its line."""
    record = dict(run.record)
    if gzip.decompress(run.requests_gz):
        name = f"{run.run_id}.requests.jsonl.gz"
        (folder / name).write_bytes(run.requests_gz)
        record["workload"] = {**record["workload"], "requests_file": name}
    return record
