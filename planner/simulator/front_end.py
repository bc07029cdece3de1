"""The front end while it serves: accepts requests and streams tokens back, in one event loop."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
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
        "_turn_s",
        "_written_s",
        "next_s",
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
        """When the loop has streamed all that it was given."""
        self._turn_s = 0.0
        """When it took, or will take, what it streams last: what comes until then joins that."""
        self._stream_s = constants.streamed_token_s + constants.streamed_chunk_s
        self._written_s = constants.streamed_chunk_s or constants.streamed_token_s
        self.next_s = math.inf
        """When a request passes next, or a turn of the loop begins; infinite if none waits."""
        self.streams = 0
        """Requests that delay a new one."""

    def accept(self, arrival_s: float, index: int, isl: int) -> None:
        """Take a request from its client; requests come in order."""
        constants = self._constants
        if constants.accepts_together:
            self._reading.append((arrival_s, index, isl, False))
        else:
            work_s = constants.request_s + isl * constants.prompt_token_s
            self._work(max(arrival_s, self._accepted_s), work_s)
            self._pass(index)
            self.streams += 1
        self.next_s = self._next_s()

    def passed(self, now_s: float) -> list[int]:
        """Return the requests that have come to the engine since the last call, in order."""
        reading, passed = self._reading, self._passed
        while reading and max(self._accepted_s, reading[0][0]) <= now_s:
            self._take_turn()
        come = []
        while passed and passed[0][0] <= now_s:
            come.append(passed.popleft()[1])
        self.next_s = self._next_s()
        return come

    def _next_s(self) -> float:
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

    def stream(self, first_s: float, last_s: float, steps: int, tokens: int) -> float:
        """Pass on the tokens of steps that end between `first_s` and `last_s`.

        Returns:
            The steps whose tokens a client gets at once, on average.

        Each step's tokens wait for the loop: D ← max(D, end) + work. Over steps that grow
        longer, the last D follows from the first and the last end alone.
        """
        work_s = tokens * self._stream_s
        if not work_s:
            return 1.0
        if tokens <= self._constants.merged_streams:
            return steps / max(self._turns(first_s, last_s, steps, tokens), 1)
        begun_s = self._streaming if self._streaming > first_s else first_s
        waited_s, kept_up_s = begun_s + steps * work_s, last_s + work_s
        self._streaming = waited_s if waited_s > kept_up_s else kept_up_s
        self._turn_s = self._streaming - work_s
        return 1.0

    def _turns(self, first_s: float, last_s: float, steps: int, tokens: int) -> int:
        """Pass on tokens of which all that wait leave in one chunk; return how many turns began."""
        token_s = tokens * self._constants.streamed_token_s
        work_s = tokens * self._stream_s
        apart_s = (last_s - first_s) / max(steps - 1, 1)
        turns = 0
        for step in range(steps):
            end_s = first_s + step * apart_s
            if end_s <= self._turn_s:
                self._streaming += token_s
                continue
            if end_s >= self._streaming and apart_s >= work_s:
                # It has caught up, and keeps up with what is left.
                self._turn_s, self._streaming = last_s, last_s + work_s
                return turns + steps - step
            self._turn_s = max(self._streaming, end_s)
            self._streaming = self._turn_s + work_s
            turns += 1
        return turns

    def deliver(self, output_s: float, tokens: int) -> float:
        """Pass on one step's tokens; return when they have left the loop, on average."""
        if not self._stream_s:
            return output_s
        self.stream(output_s, output_s, 1, tokens)
        return self._streaming - tokens * self._written_s / 2
