"""The front end while it serves: accepts requests and streams tokens back, in one event loop."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Iterator
from operator import itemgetter

from cost_models.frontend import FrontEndConstants


class FrontEnd:
    """One event loop between the clients and the step loop."""

    __slots__ = (
        "_accepted_s",
        "_constants",
        "_passed",
        "_reading",
        "_stream_s",
        "_streaming",
        "streams",
    )

    def __init__(self, constants: FrontEndConstants) -> None:
        self._constants = constants
        self._reading: deque[tuple[float, int, int, bool]] = deque()
        """Requests that wait for a turn: since when, index, tokens to read, whether begun."""
        self._passed: deque[tuple[float, int]] = deque()
        """When which request is with the engine."""
        self._accepted_s = 0.0
        self._streaming = 0.0
        self._stream_s = constants.streamed_token_s
        self.streams = 0
        """Requests that delay a new one."""

    def accept(self, arrival_s: float, index: int, isl: int) -> None:
        """Take a request from its client; requests come in order."""
        constants = self._constants
        if constants.accepts_together:
            self._reading.append((arrival_s, index, isl, False))
            return
        work_s = constants.request_s + isl * constants.prompt_token_s
        self._work(max(arrival_s, self._accepted_s), work_s)
        self._pass(index)
        self.streams += 1

    def passed(self, now_s: float) -> Iterator[int]:
        """Yield the requests that are with the engine by now, in order."""
        reading, passed = self._reading, self._passed
        while reading and max(self._accepted_s, reading[0][0]) <= now_s:
            self._take_turn()
        while passed and passed[0][0] <= now_s:
            yield passed.popleft()[1]

    @property
    def next_s(self) -> float:
        """When a request passes next, or a turn of the loop begins; infinite if none waits."""
        next_s = self._passed[0][0] if self._passed else math.inf
        if self._reading:
            next_s = min(next_s, max(self._accepted_s, self._reading[0][0]))
        return next_s

    def _take_turn(self) -> None:
        """Work on all requests that have come; what is not read to its end waits once more."""
        constants, reading = self._constants, self._reading
        start_s = max(self._accepted_s, reading[0][0])
        turn = []
        while reading and reading[0][0] <= start_s:
            turn.append(reading.popleft())
        most = constants.read_tokens or math.inf
        work_s = sum(
            min(tokens, most) * constants.prompt_token_s + (0.0 if begun else constants.request_s)
            for _, _, tokens, begun in turn
        )
        self._work(start_s, work_s)
        for _, index, tokens, _ in turn:
            if tokens > most:
                # It waits since the end of this turn: behind whoever came before that.
                waiting = (self._accepted_s, index, tokens - constants.read_tokens, True)
                insort(reading, waiting, key=itemgetter(0))
            else:
                self._pass(index)

    def _work(self, start_s: float, work_s: float) -> None:
        self._accepted_s = start_s + work_s
        self._streaming += work_s if self._stream_s else 0.0

    def _pass(self, index: int) -> None:
        """Hand a request over to the engine, no sooner than those before it."""
        ready_s = self._accepted_s + self.streams * self._constants.active_stream_s
        if self._passed:
            ready_s = max(ready_s, self._passed[-1][0])
        self._passed.append((ready_s, index))

    def begin_stream(self) -> None:
        """A request's first token leaves: where requests pass together, it delays new ones now."""
        self.streams += self._constants.accepts_together

    def end_stream(self) -> None:
        """A request's last token leaves."""
        self.streams -= 1

    def stream(self, first_s: float, last_s: float, steps: int, tokens: int) -> None:
        """Pass on the tokens of steps that end between `first_s` and `last_s`.

        Each step's tokens wait for the loop: D ← max(D, end) + work. Over steps that grow
        longer, the last D follows from the first and the last end alone.
        """
        if self._stream_s:
            work_s = tokens * self._stream_s
            waited = max(self._streaming, first_s) + steps * work_s
            self._streaming = max(waited, last_s + work_s)

    def deliver(self, output_s: float, tokens: int) -> float:
        """Pass on one step's tokens; return when they have left the loop, on average."""
        if not self._stream_s:
            return output_s
        self.stream(output_s, output_s, 1, tokens)
        return self._streaming - tokens * self._stream_s / 2
