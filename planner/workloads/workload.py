"""Workloads: who asks for what, how often, and what they accept; read from JSON or a trace."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cost_models.errors import ProfileError
from cost_models.profile_io import first_problem, read_json_object
from planner.workloads.model import (
    LARGEST_TOKENS,
    Arrival,
    LengthDistribution,
    RequestTrace,
    Workload,
)


def list_workloads() -> list[str]:
    """Return the names of the shipped workloads."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def load_workload(name_or_path: str) -> Workload:
    """Return a workload by shipped name, JSON file or trace file.

    Raises:
        ProfileError: Unknown, or the file is not a workload or a trace.
    """
    path = Path(name_or_path)
    if path.suffix == ".csv":
        return workload_of_trace(_read_azure(path), path)
    if path.suffix == ".jsonl":
        return workload_of_trace(_read_mooncake(path), path)
    if path.is_file():
        return _read_workload(path)
    name = path.stem if path.suffix == ".json" else name_or_path
    shipped = _folder() / f"{name}.json"
    if shipped.is_file() and path.parent in (Path(), Path("profiles/workloads")):
        return _read_workload(shipped)
    close = get_close_matches(name, list_workloads(), n=2)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"shipped: {', '.join(list_workloads())}"
    )
    raise ProfileError(f"workload {name_or_path!r}: no such file or shipped workload", hint=hint)


def workload_of_trace(trace: RequestTrace, path: Path) -> Workload:
    """Return a trace as a workload without model and SLO."""
    gaps = np.diff(trace.arrival_s)
    span = float(trace.arrival_s[-1] - trace.arrival_s[0])
    if span <= 0:
        raise ProfileError(f"{path}: all requests arrive at once", hint="use an offline workload")
    rate = len(gaps) / span
    osl = _empirical(trace.osl)
    return Workload(
        name=path.stem,
        title=f"Trace {path.name}",
        model="",
        arrival=Arrival(
            process="trace",
            rate_per_s=rate,
            cv=float(gaps.std() * rate),
            num_requests=len(trace.isl),
        ),
        isl=_empirical(trace.isl),
        osl=osl,
        max_output_tokens=max(int(osl.quantile(0.99)), 1),
        source=str(path),
        trace=trace,
    )


def _read_workload(path: Path) -> Workload:
    from pydantic import ValidationError  # noqa: PLC0415  not needed to show help

    from planner.workloads.schema import WorkloadProfile  # noqa: PLC0415

    data = read_json_object(path)
    try:
        profile = WorkloadProfile.model_validate(data)
    except ValidationError as error:
        raise first_problem(error, path) from None
    trace_file = profile.arrival.file
    if trace_file:
        trace = _read_trace(path.parent / trace_file)
        base = workload_of_trace(trace, path.parent / trace_file)
        return profile.workload(path, base)
    return profile.workload(path, None)


def _read_trace(path: Path) -> RequestTrace:
    return _read_azure(path) if path.suffix == ".csv" else _read_mooncake(path)


def _read_azure(path: Path) -> RequestTrace:
    """TIMESTAMP, ContextTokens, GeneratedTokens (Azure public dataset)."""
    text = _read_text(path)
    reader = csv.DictReader(text.splitlines())
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if not reader.fieldnames or not set(columns) <= set(reader.fieldnames):
        raise ProfileError(f"{path}: not an Azure trace", hint=f"columns: {', '.join(columns)}")
    rows = []
    for number, row in enumerate(reader, 2):
        try:
            # Seven digits of a second are one more than datetime takes.
            stamp = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            rows.append((stamp, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (TypeError, ValueError) as error:
            raise ProfileError(f"{path}: line {number}: {error}") from None
    return _trace(rows, path)


def _read_mooncake(path: Path) -> RequestTrace:
    """One JSON object a line: timestamp (ms), input_length, output_length, hash_ids."""
    rows, hashes = [], []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(
                (float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]))
            )
            hashes.append([int(block) for block in row.get("hash_ids", [])])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ProfileError(
                f"{path}: line {number}: {error!r}",
                hint="each line holds timestamp (ms), input_length, output_length",
            ) from None
    return _trace(rows, path, hashes)


def _trace(
    rows: list[tuple[float, int, int]], path: Path, hashes: list[list[int]] | None = None
) -> RequestTrace:
    if len(rows) < 2:
        raise ProfileError(f"{path}: holds {len(rows)} requests", hint="a trace needs two at least")
    arrival, isl, osl = (np.array(column) for column in zip(*rows, strict=True))
    if not np.isfinite(arrival).all():
        raise ProfileError(f"{path}: a timestamp is not a number")
    for name, lengths in (("prompt", isl), ("output", osl)):
        wrong = (lengths < 0) | (lengths > LARGEST_TOKENS)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ProfileError(f"{path}: request {row + 1} has a {name} of {lengths[row]} tokens")
    order = np.argsort(arrival, kind="stable")
    return RequestTrace(
        arrival_s=(arrival - arrival.min())[order].astype(np.float64),
        isl=np.maximum(isl[order], 1).astype(np.int64),
        osl=np.maximum(osl[order], 1).astype(np.int64),
        prefix_hashes=[hashes[i] for i in order] if hashes and any(hashes) else None,
    )


def _empirical(tokens: NDArray[np.int64]) -> LengthDistribution:
    ordered = np.sort(tokens).astype(np.float64)
    return LengthDistribution(probabilities=np.linspace(0.0, 1.0, len(ordered)), tokens=ordered)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not a text file ({error})") from None


def _folder() -> Path:
    return Path(str(files("profiles"))) / "workloads"
