"""What the client saw of every request of a run, as arrays; seconds from the run's start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

LONG_GAP = 2.0
"""A gap between tokens is long from so many times the median."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestLog:
    """The requests of a run; those without a token have NaN times."""

    arrival_s: FloatArray
    first_token_s: FloatArray
    """From the start of the run."""
    last_token_s: FloatArray
    isl: FloatArray
    osl: FloatArray
    gap_end_s: FloatArray
    """When each gap between two chunks ended, over all requests."""
    gap_s: FloatArray
    statuses: tuple[str, ...]
    errors: tuple[str, ...]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> RequestLog:
        """Return the log of the lines of a requests file."""
        rows = list(lines)
        arrival = np.array([float(row["arrival_s"]) for row in rows])
        first = arrival + 1e-3 * _column(rows, "ttft_ms")
        gaps = [1e-3 * np.array(row.get("itl_ms") or [], float) for row in rows]
        ends = [start + np.cumsum(gap) for start, gap in zip(first, gaps, strict=True)]
        return cls(
            arrival_s=arrival,
            first_token_s=first,
            last_token_s=arrival + 1e-3 * _column(rows, "e2el_ms"),
            isl=_column(rows, "isl"),
            osl=_column(rows, "osl"),
            gap_end_s=np.concatenate([*ends, np.zeros(0)]),
            gap_s=np.concatenate([*gaps, np.zeros(0)]),
            statuses=tuple(str(row.get("status", "ok")) for row in rows),
            errors=tuple(str(row.get("error", "")) for row in rows),
        )

    @cached_property
    def served(self) -> NDArray[np.bool_]:
        """Which requests got a token."""
        return np.isfinite(self.first_token_s)

    @property
    def most_decoding(self) -> int:
        """Most requests that were between their first and last token at once."""
        starts, ends = self.first_token_s[self.served], self.last_token_s[self.served]
        return int(_in_flight(starts, ends)[1].max(initial=0))

    @property
    def mean_decoding(self) -> float:
        """Requests between first and last token, averaged over the time with any at work."""
        span_s = float(np.sum((self.last_token_s - self.first_token_s)[self.served]))
        return span_s / self.busy_s if self.busy_s > 0 else 0.0

    @cached_property
    def busy_s(self) -> float:
        """Time in which at least one request was in flight."""
        times_s, counts = _in_flight(self.arrival_s[self.served], self.last_token_s[self.served])
        return float(np.sum(np.diff(times_s)[counts[:-1] > 0])) if times_s.size else 0.0

    @property
    def length_s(self) -> float:
        """From the first arrival to the last token."""
        if not self.served.any():
            return 0.0
        return float(np.nanmax(self.last_token_s) - self.arrival_s.min())

    @property
    def median_gap_s(self) -> float:
        """Median gap between two chunks of a request."""
        return float(np.median(self.gap_s)) if self.gap_s.size else 0.0

    @property
    def decode_share_of_long_gaps(self) -> float:
        """Share of all decode time that long gaps last beyond the median."""
        total_s = self.gap_s.sum()
        return float(self._excess_s.sum() / total_s) if total_s > 0 else 0.0

    @property
    def long_gaps_with_prefill(self) -> float:
        """Share of the excess of long gaps in which another request got its first token.

        A step that ends a prompt gives that request its first token in the moment in which
        those that decode get their next, so the gap that it made ends there.
        """
        excess = self._excess_s
        if not excess.sum():
            return 0.0
        return float(excess[self._meets_first_token].sum() / excess.sum())

    @property
    def short_gaps_with_prefill(self) -> float:
        """Share of the other gaps in which one got its first token: what chance would give."""
        short = self.gap_s <= LONG_GAP * self.median_gap_s
        return float(self._meets_first_token[short].mean()) if short.any() else 0.0

    @cached_property
    def _excess_s(self) -> FloatArray:
        is_long = self.gap_s > LONG_GAP * self.median_gap_s
        return np.where(is_long, self.gap_s - self.median_gap_s, 0.0)

    @cached_property
    def _meets_first_token(self) -> NDArray[np.bool_]:
        """Whether a first token came within each gap, or at its end within half a usual gap."""
        firsts = np.sort(self.first_token_s[self.served])
        slack_s = 0.5 * self.median_gap_s
        before = np.searchsorted(firsts, self.gap_end_s - self.gap_s + slack_s, side="right")
        until = np.searchsorted(firsts, self.gap_end_s + slack_s, side="right")
        return np.asarray(until > before)

    def longest_silence(self) -> tuple[float, float]:
        """Return start and end of the longest time in which nothing was sent and none came."""
        events = np.concatenate([self.arrival_s, self.first_token_s[self.served], self.gap_end_s])
        events = np.sort(events)
        if events.size < 2:
            return 0.0, 0.0
        at = int(np.argmax(np.diff(events)))
        return float(events[at]), float(events[at + 1])

    def waiting_during(self, start_s: float, end_s: float) -> tuple[float, float]:
        """Return request-seconds spent waiting for a first, and for a next token, in a stretch."""
        served = self.served
        first = _overlap(self.arrival_s[served], self.first_token_s[served], start_s, end_s)
        later = _overlap(self.first_token_s[served], self.last_token_s[served], start_s, end_s)
        return first, later


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> FloatArray:
    values = (row.get(name) for row in rows)
    return np.array([np.nan if value is None else float(value) for value in values])


def _overlap(starts: FloatArray, ends: FloatArray, start_s: float, end_s: float) -> float:
    shared = np.minimum(ends, end_s) - np.maximum(starts, start_s)
    return float(np.maximum(shared, 0.0).sum())


def _in_flight(starts: FloatArray, ends: FloatArray) -> tuple[FloatArray, NDArray[np.int64]]:
    """Return the moments of change, and how many intervals are open from each on."""
    times = np.concatenate([starts, ends])
    steps = np.concatenate([np.ones(len(starts), np.int64), -np.ones(len(ends), np.int64)])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(steps[order])
