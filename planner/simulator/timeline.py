"""What a simulated deployment did over time, at evenly spaced moments: KV blocks, steps, queue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.simulator.results import EngineTrace, SimulationResult

FloatArray = NDArray[np.float64]

DECODE, PREFILL, MIXED, IDLE = 0, 1, 2, 3
KINDS = ("decode", "prefill", "mixed", "idle")
"""Names of the kinds of steps, by number."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """The state of all engines at some moments; each array has one entry a moment."""

    at_s: FloatArray
    """Since the first step."""
    used_blocks: FloatArray
    """KV blocks that running sequences hold."""
    wasted_blocks: FloatArray
    """Held block space without a token, in blocks; 0 where sequences share blocks."""
    shared_blocks: FloatArray
    """Blocks saved because sequences read them in common; at least so many."""
    capacity_blocks: float
    running: FloatArray
    """Decoding sequences."""
    waiting: FloatArray
    step_s: FloatArray
    """Length of the step of the first engine; NaN where it idles."""
    kind: NDArray[np.int64]
    """Of that step: an index of `KINDS`."""


def timeline(result: SimulationResult, *, moments: int = 400) -> Timeline:
    """Look at a simulated run at evenly spaced moments.

    Waste cannot be told while prompts are processed: there it is what it was before.
    """
    start_s = min(float(trace.log.start_s[0]) for trace in result.engines)
    end_s = max(float(trace.log.end_s[-1]) for trace in result.engines)
    at_s = np.linspace(start_s, end_s, moments, endpoint=False)
    parts = [_looked_at(trace, at_s) for trace in result.engines]
    used, wasted, shared, running, waiting = (
        np.sum([part[index] for part in parts], axis=0) for index in range(5)
    )
    step_s, kind = _steps(result.engines[0], at_s)
    return Timeline(
        at_s=at_s - start_s,
        used_blocks=used,
        wasted_blocks=wasted,
        shared_blocks=shared,
        capacity_blocks=sum(t.pool.capacity / max(t.pool.full_units, 1) for t in result.engines),
        running=running,
        waiting=waiting,
        step_s=step_s,
        kind=kind,
    )


def _rows(trace: EngineTrace, at_s: FloatArray) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the row of the log that each moment lies in or after, and whether it lies in it."""
    rows = np.searchsorted(trace.log.start_s, at_s, side="right") - 1
    found = np.maximum(rows, 0)
    return found, (rows >= 0) & (at_s < trace.log.end_s[found])


def _looked_at(trace: EngineTrace, at_s: FloatArray) -> tuple[FloatArray, ...]:
    log, pool = trace.log, trace.pool
    rows, works = _rows(trace, at_s)
    used_blocks = trace.held_tokens / pool.tokens_per_block
    used = used_blocks[rows]
    can_tell = (log.prompts == 0) & (pool.windows == ())
    # The last row before each at which tokens can be counted.
    known = np.maximum.accumulate(np.where(can_tell, np.arange(len(log.steps)), -1))[rows]
    told = np.maximum(known, 0)
    gap = used_blocks[told] - trace.cached_tokens[told] / pool.tokens_per_block
    gap = np.where(works & (known >= 0), gap, 0.0)
    wasted = np.zeros_like(gap) if trace.shares_prefixes else np.clip(gap, 0.0, used)
    shared = np.clip(-gap, 0.0, None) if trace.shares_prefixes else np.zeros_like(gap)
    busy = works.astype(np.float64)
    return used * busy, wasted * busy, shared, log.decoding[rows] * busy, log.waiting[rows] * busy


def _steps(trace: EngineTrace, at_s: FloatArray) -> tuple[FloatArray, NDArray[np.int64]]:
    log = trace.log
    rows, works = _rows(trace, at_s)
    length_s = (log.end_s[rows] - log.start_s[rows]) / log.steps[rows]
    kind = np.where(
        log.prompts[rows] == 0, DECODE, np.where(log.decoding[rows] > 0, MIXED, PREFILL)
    )
    return np.where(works, length_s, np.nan), np.where(works, kind, IDLE)
