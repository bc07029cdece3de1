"""When requests come: on their own clock, when an earlier one ends, or all at once."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

READ_AHEAD = 4096
"""Arrivals turned into Python numbers at a time."""


class ArrivalSource(Protocol):
    """Gives requests out in order of their index."""

    next_s: float
    """When the next request is sent; infinite when none is left or it waits for another's end."""

    def take(self) -> int:
        """Send the next request and return its index."""

    def finished(self, time_s: float) -> None:
        """Learn that a client has its last token, or a refusal."""


class OpenLoop:
    """Requests arrive at given times, however slow the server is.

    Args:
        arrival_s: Ascending.
        indices: Index of each request; counted from 0 where absent.
    """

    def __init__(self, arrival_s: FloatArray, indices: IntArray | None = None) -> None:
        self._arrival_s = arrival_s
        self._indices = np.arange(len(arrival_s)) if indices is None else indices
        self._ahead: list[tuple[float, int]] = []
        self._taken = 0
        self.next_s = self._peek()

    def take(self) -> int:
        """Send the next request and return its index."""
        index = self._ahead[self._taken % READ_AHEAD][1]
        self._taken += 1
        self.next_s = self._peek()
        return index

    def finished(self, time_s: float) -> None:
        """Nobody waits for an end."""

    def _peek(self) -> float:
        offset = self._taken % READ_AHEAD
        if offset == 0:
            ahead = slice(self._taken, self._taken + READ_AHEAD)
            times, indices = self._arrival_s[ahead].tolist(), self._indices[ahead].tolist()
            self._ahead = list(zip(times, indices, strict=True))
        return self._ahead[offset][0] if offset < len(self._ahead) else math.inf


class ClosedLoop:
    """A fixed number of clients; each sends its next request when its last one has ended."""

    def __init__(self, *, concurrency: int, num_requests: int) -> None:
        self._left = num_requests
        self._index = 0
        self._ready = [0.0] * min(concurrency, num_requests)
        self.next_s = self._ready[0] if self._ready else math.inf

    def take(self) -> int:
        """Send the next request and return its index."""
        heappop(self._ready)
        self._index += 1
        self._left -= 1
        self.next_s = self._ready[0] if self._ready and self._left else math.inf
        return self._index - 1

    def finished(self, time_s: float) -> None:
        """A client is free to send its next request."""
        heappush(self._ready, time_s)
        self.next_s = self._ready[0] if self._left else math.inf


def poisson_arrivals(rng: np.random.Generator, *, rate_per_s: float, count: int) -> FloatArray:
    """Return the times of a Poisson process, the first at 0."""
    return gamma_arrivals(rng, rate_per_s=rate_per_s, cv=1.0, count=count)


def gamma_arrivals(
    rng: np.random.Generator, *, rate_per_s: float, cv: float, count: int
) -> FloatArray:
    """Return times whose gaps are gamma-distributed with a coefficient of variation, from 0."""
    shape = 1.0 / cv**2
    gaps = rng.gamma(shape, 1.0 / (shape * rate_per_s), max(count - 1, 0))
    return np.concatenate([np.zeros(min(count, 1)), np.cumsum(gaps)])


def offline_arrivals(count: int) -> FloatArray:
    """Return a burst: everything is queued at the start."""
    return np.zeros(count)
