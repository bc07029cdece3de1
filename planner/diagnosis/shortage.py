"""How many bytes an engine lacked: what its log says, what the memory model says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cost_models.units import GIB

_UNITS = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "bytes": 1.0}

_SIZE = r"([\d.]+) ?(KiB|MiB|GiB|bytes)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Memory that an engine asked for and did not get; bytes."""

    needed_bytes: float
    there_bytes: float
    of_kv_cache: bool
    """Whether the KV cache was too small, not an allocation too large."""
    words: str
    is_another_process: bool = False
    """Whether the memory was taken before the engine began."""

    @property
    def short_bytes(self) -> float:
        """What was missing."""
        return max(self.needed_bytes - self.there_bytes, 0.0)


def shortage_in_log(text: str) -> Shortage | None:
    """Return the last shortage that a log puts into numbers."""
    found = (match for pattern, read in _READERS for match in _shortages(pattern, read, text))
    return next(iter(reversed(list(found))), None)


def _shortages(
    pattern: re.Pattern[str], read: Callable[[re.Match[str]], Shortage], text: str
) -> list[Shortage]:
    return [read(match) for match in pattern.finditer(text)]


def _of_torch(match: re.Match[str]) -> Shortage:
    tried, unit, free, free_unit = match.groups()
    needed = float(tried) * _UNITS[unit]
    there = float(free) * _UNITS[free_unit] if free else 0.0
    beside = f" beside {there / GIB:.2f} GiB free" if free else ""
    return Shortage(
        needed_bytes=needed,
        there_bytes=there,
        of_kv_cache=False,
        words=f"the log: an allocation of {needed / GIB:.2f} GiB failed{beside}",
    )


def _of_kv_cache(match: re.Match[str]) -> Shortage:
    needed, there = (float(value) * GIB for value in match.groups())
    return Shortage(
        needed_bytes=needed,
        there_bytes=there,
        of_kv_cache=True,
        words=f"the log: one sequence of max_seq_len takes {needed / GIB:.2f} GiB of KV cache, "
        f"{there / GIB:.2f} GiB are left for it",
    )


def _of_start(match: re.Match[str]) -> Shortage:
    free, total, wanted = (float(value) * GIB for value in match.groups())
    return Shortage(
        needed_bytes=wanted,
        there_bytes=free,
        of_kv_cache=False,
        is_another_process=True,
        words=f"the log: {free / GIB:.2f} of {total / GIB:.2f} GiB were free before anything was "
        f"loaded, {wanted / GIB:.2f} GiB are asked for: another process holds the rest",
    )


_READERS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Shortage]], ...] = (
    (
        re.compile(rf"Tried to allocate {_SIZE}(?:.*?of which {_SIZE} is free)?"),
        _of_torch,
    ),
    (
        re.compile(r"\(([\d.]+) GiB KV cache is needed.*?memory \(([\d.]+) GiB\)", re.DOTALL),
        _of_kv_cache,
    ),
    (
        re.compile(
            r"Free memory on device \S+ \(([\d.]+)/([\d.]+) GiB\) on startup is less than "
            r"desired GPU memory utilization \([\d.]+, ([\d.]+) GiB\)"
        ),
        _of_start,
    ),
)
"""PyTorch's allocator; vLLM 0.25, `v1/core/kv_cache_utils.py` and `v1/worker/utils.py`."""
