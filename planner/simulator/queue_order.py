"""Orders of the waiting queue. One class each; ties go to the earlier arrival."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heapify, heappop, heappush, nsmallest
from typing import Protocol

from planner.simulator.kv_manager import KvManager
from planner.simulator.request import Request

_Entry = tuple[float, int, Request]
"""Key, tie-breaker, request."""

LOOK_AHEAD = 64
"""Waiting requests that longest-prefix matching compares."""


class QueueOrder(Protocol):
    """Which waiting request is served next: a fixed key, the smallest first."""

    def key(self, request: Request) -> float:
        """Return the rank of a request."""


class FirstComeFirstServed:
    """By arrival at the engine: a front end may let others pass first."""

    def key(self, request: Request) -> float:
        """Return its place in the order of arrival."""
        return float(request.place)


class ShortestJobFirst:
    """By predicted output length, right or wrong."""

    def key(self, request: Request) -> float:
        """Return the predicted output tokens."""
        return request.predicted_osl


class PriorityWithAgeing:
    """By class of service; waiting `ageing_s` makes up for one class.

    With linear ageing the order of two requests never changes, so the key is fixed.
    """

    def __init__(self, ageing_s: float) -> None:
        self.ageing_s = ageing_s

    def key(self, request: Request) -> float:
        """Return the arrival, later by `ageing_s` for each class below the first."""
        return request.arrival_s + request.priority * self.ageing_s


class LongestPrefixMatch(FirstComeFirstServed):
    """Among the first few that wait, the one that finds most of its prompt in the cache."""


ORDERS: Mapping[str, QueueOrder] = {
    "FIRST_COME_FIRST_SERVED": FirstComeFirstServed(),
    "SHORTEST_JOB_FIRST": ShortestJobFirst(),
    "PRIORITY": PriorityWithAgeing(ageing_s=10.0),
    "LONGEST_PREFIX_MATCH": LongestPrefixMatch(),
}
"""Orders by the name that a configuration gives them."""


class WaitingQueue:
    """Requests that wait; those paused go before all others."""

    def __init__(self, order: QueueOrder, kv: KvManager) -> None:
        self._order = order
        self._cache = kv.cache if isinstance(order, LongestPrefixMatch) else None
        self._heap: list[_Entry] = []
        self._paused = 0
        self.count = 0
        """Requests that wait."""

    def push(self, request: Request) -> None:
        """Queue a request."""
        heappush(self._heap, (self._order.key(request), request.index, request))
        self.count += 1

    def push_first(self, request: Request) -> None:
        """Queue a paused request before all others."""
        self._paused -= 1
        heappush(self._heap, (-math.inf, self._paused, request))
        self.count += 1

    def first(self) -> Request:
        """Return who is next."""
        return self._best()[2]

    def remove(self, request: Request) -> None:
        """Take out the request that `first` named."""
        self.count -= 1
        if self._heap[0][2] is request:
            heappop(self._heap)
            return
        self._heap = [entry for entry in self._heap if entry[2] is not request]
        heapify(self._heap)

    def _best(self) -> _Entry:
        cache = self._cache
        if cache is None or self.count == 1:
            return self._heap[0]
        ahead = nsmallest(LOOK_AHEAD, self._heap, key=lambda entry: entry[:2])
        return max(ahead, key=lambda entry: cache.matched(entry[2].hashes))
