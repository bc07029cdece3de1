"""Per-request results in preallocated columns; nothing of a finished request stays in Python."""

from __future__ import annotations

import math
from array import array


class RequestRecorder:
    """Times and counts of every request by its index."""

    __slots__ = (
        "_paused_s",
        "arrival_s",
        "cached_tokens",
        "first_s",
        "last_s",
        "pauses_s",
        "preemptions",
        "refused",
        "served_by",
        "started_s",
    )

    def __init__(self, count: int) -> None:
        unknown = array("d", [math.nan])
        self.arrival_s = unknown * count
        self.started_s = unknown * count
        """When its first chunk began to run."""
        self.first_s = unknown * count
        self.last_s = unknown * count
        self.preemptions = array("i", [0]) * count
        self.cached_tokens = array("i", [0]) * count
        self.refused = array("b", [0]) * count
        """Why the engine turned it away (`planner.simulator.limits.Refusal`); 0 if it did not."""
        self.served_by = array("i", [0]) * count
        """Number of the scheduler instance that served it."""
        self.pauses_s = array("d")
        """Gaps between two tokens of a request that lay in a pause."""
        self._paused_s: dict[int, list[float]] = {}
        """When each was paused, oldest first: a token may still be on its way at the next pause."""

    def arrive(self, index: int, time_s: float) -> None:
        """The client sends the request."""
        self.arrival_s[index] = time_s

    def refuse(self, index: int, reason: int) -> None:
        """The engine turns the request away."""
        self.refused[index] = reason

    def start(self, index: int, time_s: float, cached_tokens: int) -> None:
        """The first chunk of the prompt runs; what runs again after a pause does not count."""
        if self.started_s[index] != self.started_s[index]:
            self.started_s[index] = time_s
        self.cached_tokens[index] = cached_tokens

    def first_token(self, index: int, time_s: float) -> None:
        """The client has the first token, or the first after a pause."""
        if self.first_s[index] != self.first_s[index]:
            self.first_s[index] = time_s
        elif index in self._paused_s:
            pauses = self._paused_s[index]
            self.pauses_s.append(time_s - pauses.pop(0))
            if not pauses:
                del self._paused_s[index]

    def last_token(self, index: int, time_s: float) -> None:
        """The client has the last token."""
        self.last_s[index] = time_s

    def preempt(self, index: int) -> None:
        """The request lost its blocks."""
        self.preemptions[index] += 1

    def pause(self, index: int, time_s: float) -> None:
        """A decoding request stops after its token of that time; the next one counts from here."""
        self._paused_s.setdefault(index, []).append(time_s)
