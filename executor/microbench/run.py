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
from executor.microbench.collectives import RankGroups
from executor.microbench.operators import OPERATORS
from executor.microbench.points import Abilities, Point, Schedule, Speed, calibration_points
from executor.microbench.technique_operators import TECHNIQUE_OPERATORS
from executor.microbench.techniques import TECHNIQUES, technique_points
from executor.microbench.timing import call_s

OPERATOR_FAMILIES = ("gemm", "attention_context", "attention_decode", "nccl")
"""Families of which the planner has models; the others are facts about the machine."""

CALIBRATION_FAMILIES = (*OPERATORS, "nccl")
"""What a calibration times; asked for nothing else, this is timed."""

FAMILIES = tuple(dict.fromkeys((*CALIBRATION_FAMILIES, *TECHNIQUES)))

MOVING_FAMILIES = ("bandwidth", "kv_cache", "kv_append")
"""Families of which the bytes moved and their rate are worth a column."""

MAKERS = {**OPERATORS, **TECHNIQUE_OPERATORS}

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
    *,
    system: str,
    time_budget_s: float,
    device: str = "",
    families: Sequence[str] = CALIBRATION_FAMILIES,
    progress: Progress | None = None,
) -> Microbench:
    """Time as many kernels as the budget allows, the most informative first.

    Args:
        system: Profile name of the GPU, for the `system` column.
        time_budget_s: For everything.
        device: `cuda` or `cpu`; by default the GPU where there is one.
        families: Of `FAMILIES`.
        progress: Told the point and the seconds left.

    Raises:
        MeasurementError: torch is not installed, there is no such device or family, or the device
            can time nothing of it.
    """
    until_s = time.monotonic() + time_budget_s
    device = _device(device)
    points = _points(device, families)
    schedule = Schedule(points=points, speed=_speed(device))
    common = {"system": system, **_provenance(device)}
    rows, failures, kernel_errors = [], [], _kernel_errors()
    with RankGroups(device) as groups:
        for point in schedule:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            if progress is not None:
                progress(f"{point.family} {_shown(point)}", left_s)
            try:
                rows.append(_row(point, common, _seconds(point, device, groups)))
            except kernel_errors as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                failures.append((f"{point.family} {_shown(point)}", reason))
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


def _points(device: str, families: Sequence[str]) -> list[Point]:
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise MeasurementError(
            f"family {unknown[0]!r} is unknown", hint=f"known: {', '.join(FAMILIES)}"
        )
    abilities = Abilities(
        dtypes=_dtypes(device), triton=_has_triton(device), num_gpus=_num_gpus(device)
    )
    points = [p for p in calibration_points(abilities) if p.family in families]
    techniques = [name for name in families if name not in CALIBRATION_FAMILIES]
    points += technique_points(abilities, techniques)
    if not points:
        raise MeasurementError(
            f"nothing of {', '.join(families)} can be timed on this device",
            hint="Triton's kernels need a GPU, collectives several",
        )
    return points


def _kernel_errors() -> tuple[type[Exception], ...]:
    """Return what a kernel fails with that cannot be compiled, launched or given its memory."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.runtime.errors import TritonError  # noqa: PLC0415

    return (RuntimeError, TritonError)


def _seconds(point: Point, device: str, groups: RankGroups) -> float:
    if point.family == "nccl":
        ranks, elements = int(point.key["num_gpus"]), int(point.key["message_elements"])
        return groups.allreduce_s(ranks, elements)
    work = MAKERS[point.family](dict(point.key), device)
    return call_s(work, device, in_graph=point.key.get("op") != "eager")


def _row(point: Point, common: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    row = {"family": point.family, **common, **point.key, "latency_us": round(seconds * 1e6, 4)}
    if point.family in MOVING_FAMILIES:
        row["bytes_moved"] = round(point.bytes_moved)
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
