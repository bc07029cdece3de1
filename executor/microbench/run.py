"""A whole benchmark under a time budget, and the tables that it writes."""

from __future__ import annotations

import csv
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_models.errors import MeasurementError
from executor.machine import installed_versions
from executor.microbench.operators import work_of
from executor.microbench.points import Point, Schedule, Speed, all_points
from executor.microbench.timing import call_s

OPERATOR_FAMILIES = ("gemm", "attention_context", "attention_decode", "nccl")
"""Families of which the planner has models; the others are facts about the machine."""

CPU_SPEED = Speed(flop_per_s=2e10, bytes_per_s=5e9, memory_bytes=4e9, longest_call_s=0.05)
"""A slow host: only small points are worth their time there."""

GPU_FLOP_PER_S, GPU_BYTES_PER_S, GPU_LONGEST_CALL_S = 2e14, 1e12, 0.2
"""Orders of magnitude, enough to put points into order."""

FP8_CAPABILITY = (8, 9)

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbench:
    """What was timed, and what could not be."""

    rows: tuple[Mapping[str, Any], ...]
    failures: tuple[tuple[str, str], ...]
    """(point, reason)."""
    num_points: int
    """How many there would have been without a time limit."""


def microbench(
    *, system: str, time_budget_s: float, device: str = "", progress: Progress | None = None
) -> Microbench:
    """Time as many kernels as the budget allows, the most informative first.

    Args:
        system: Profile name of the GPU, for the `system` column.
        time_budget_s: For everything.
        device: `cuda` or `cpu`; by default the GPU where there is one.
        progress: Told the point and the seconds left.

    Raises:
        MeasurementError: torch is not installed, or there is no such device.
    """
    until_s = time.monotonic() + time_budget_s
    device = _device(device)
    points = all_points(
        dtypes=_dtypes(device), num_gpus=_num_gpus(device), paged=_has_triton(device)
    )
    schedule = Schedule(points=points, speed=_speed(device))
    common = {"system": system, **_provenance(device)}
    rows, failures = [], []
    for point in schedule:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            break
        if progress is not None:
            progress(f"{point.family} {_shown(point)}", left_s)
        try:
            rows.append(_row(point, device, common))
        except RuntimeError as error:
            failures.append((f"{point.family} {_shown(point)}", str(error).splitlines()[0]))
    return Microbench(rows=tuple(rows), failures=tuple(failures), num_points=len(points))


def write_tables(result: Microbench, folder: Path) -> list[Path]:
    """Write one CSV a family, and `operators.csv` with all that the planner has models of."""
    folder.mkdir(parents=True, exist_ok=True)
    families = sorted({str(row["family"]) for row in result.rows})
    written = []
    for family in families:
        rows = [row for row in result.rows if row["family"] == family]
        written.append(_write(folder / f"{family}.csv", rows))
    operators = [row for row in result.rows if row["family"] in OPERATOR_FAMILIES]
    if operators:
        written.append(_write(folder / "operators.csv", operators))
    return written


def _row(point: Point, device: str, common: Mapping[str, Any]) -> dict[str, Any]:
    in_graph = point.family != "nccl" and point.key.get("op") != "eager"
    seconds = call_s(work_of(point, device), device, in_graph=in_graph)
    row = {"family": point.family, **common, **point.key, "latency_us": round(seconds * 1e6, 4)}
    if point.family == "bandwidth":
        row["bytes_per_s"] = round(point.bytes_moved / seconds)
    return row


def _device(wanted: str) -> str:
    if importlib.util.find_spec("torch") is None:
        raise MeasurementError(
            "torch is not installed", hint="pip install 'trtllm-planner[transformers]'"
        )
    import torch  # noqa: PLC0415

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and found != "cuda":
        raise MeasurementError("torch finds no CUDA device", hint="--device cpu is for a try")
    return wanted or found


def _dtypes(device: str) -> Sequence[str]:
    if device == "cpu":
        return ("bfloat16",)
    import torch  # noqa: PLC0415

    narrow = torch.cuda.get_device_capability() >= FP8_CAPABILITY
    return ("bfloat16", "fp8") if narrow else ("bfloat16",)


def _num_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch  # noqa: PLC0415

    return int(torch.cuda.device_count())


def _has_triton(device: str) -> bool:
    return device != "cpu" and importlib.util.find_spec("triton") is not None


def _speed(device: str) -> Speed:
    if device == "cpu":
        return CPU_SPEED
    import torch  # noqa: PLC0415

    return Speed(
        flop_per_s=GPU_FLOP_PER_S,
        bytes_per_s=GPU_BYTES_PER_S,
        memory_bytes=float(torch.cuda.mem_get_info()[0]),
        longest_call_s=GPU_LONGEST_CALL_S,
    )


def _provenance(device: str) -> dict[str, str]:
    versions = installed_versions(("torch", "triton"))
    name = "cpu"
    if device != "cpu":
        import torch  # noqa: PLC0415

        name = torch.cuda.get_device_name()
    return {
        "framework_version": "torch " + versions.get("torch", ""),
        "device_name": name,
        "kernel_source": "torch, triton " + versions["triton"] if "triton" in versions else "torch",
    }


def _shown(point: Point) -> str:
    return " ".join(str(value) for value in point.key.values())


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    columns = list(dict.fromkeys(_columns(rows)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _columns(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield from row
