"""The part of a run in which the load was steady, and stalls of the whole engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.metrics import percentile
from executor.records import MeasuredRequest, RequestStatus, measured_section

FULL_FRACTION = 0.9
"""Share of the usual number of requests in flight above which the load counts as full."""

STALL_FACTOR = 10.0
"""A stall is so many times as long as nearly all other silences of the run."""

LEAST_STALL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of a run; seconds from its start."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


def steady_window(requests: Sequence[MeasuredRequest]) -> Window | None:
    """Return the stretch between ramp-up and tail, or None where nothing was served.

    It lasts from the first to the last moment at which nearly as many requests were in flight
    as there were for most of the run.
    """
    served = [r for r in requests if r.chunk_s]
    if not served:
        return None
    times_s, in_flight = _in_flight(served)
    spans_s = np.diff(times_s)
    order = np.argsort(in_flight[:-1])
    half = np.searchsorted(np.cumsum(spans_s[order]), spans_s.sum() / 2)
    usual = in_flight[:-1][order][min(half, len(order) - 1)]
    full = np.flatnonzero(in_flight[:-1] >= FULL_FRACTION * usual)
    return Window(start_s=float(times_s[full[0]]), end_s=float(times_s[full[-1] + 1]))


def steady_section(requests: Sequence[MeasuredRequest]) -> dict[str, float]:
    """Return what was measured inside the steady window; flat, empty without one.

    Rates count the tokens that came inside it, latencies the requests that were sent inside.
    """
    window = steady_window(requests)
    if window is None or window.length_s <= 0:
        return {}
    tokens = sum(
        count
        for r in requests
        for at_s, count in zip(r.chunk_s, r.chunk_tokens, strict=True)
        if window.start_s <= r.arrival_s + at_s <= window.end_s
    )
    inside = [
        r
        for r in requests
        if r.status is RequestStatus.OK and window.start_s <= r.arrival_s <= window.end_s
    ]
    section = measured_section(inside)
    latencies = {
        f"{name}_{statistic}": section[name][statistic]
        for name in ("ttft_ms", "tpot_ms")
        for statistic in ("mean", "p99")
        if section[name][statistic] is not None
    }
    return {
        "start_s": round(window.start_s, 3),
        "length_s": round(window.length_s, 3),
        "output_tok_per_s": round(tokens / window.length_s, 2),
        "num_requests": float(len(inside)),
        **latencies,
    }


def longest_stall_s(requests: Sequence[MeasuredRequest]) -> float:
    """Return the longest silence of the whole engine that is no ordinary one, or 0.

    Only silences count during which a request was waiting for a token.
    """
    served = [r for r in requests if r.chunk_s]
    if not served:
        return 0.0
    times_s, in_flight = _in_flight(served)
    events_s = np.concatenate([r.arrival_s + np.array([0.0, *r.chunk_s]) for r in served])
    events_s = np.unique(events_s)
    busy = in_flight[np.searchsorted(times_s, events_s[:-1], side="right") - 1] > 0
    silences_s = np.diff(events_s)[busy]
    if not silences_s.size:
        return 0.0
    longest_s = float(silences_s.max())
    usual_s = percentile(silences_s, 0.99 if silences_s.size > 100 else 0.5)
    return longest_s if longest_s > max(LEAST_STALL_S, STALL_FACTOR * usual_s) else 0.0


def _in_flight(
    requests: Sequence[MeasuredRequest],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the moments at which a request came or ended, and how many were there from then."""
    arrivals = np.array([r.arrival_s for r in requests])
    ends = np.array([r.arrival_s + r.e2el_s for r in requests])
    times = np.concatenate([arrivals, ends])
    steps = np.concatenate([np.ones(len(arrivals), int), -np.ones(len(ends), int)])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(steps[order])
