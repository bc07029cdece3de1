"""The front end while it serves: accepts requests one by one and streams tokens back."""

from __future__ import annotations

from cost_models.frontend import FrontEndConstants


class FrontEnd:
    """One event loop between the clients and the step loop."""

    __slots__ = ("_accepted_s", "_constants", "_stream_s", "_streaming", "streams")

    def __init__(self, constants: FrontEndConstants) -> None:
        self._constants = constants
        self._accepted_s = 0.0
        self._streaming = 0.0
        self._stream_s = constants.streamed_token_s
        self.streams = 0
        """Requests that wait or are served."""

    def accept(self, arrival_s: float, isl: int) -> float:
        """Return when a request has passed the front end; requests pass in order."""
        constants = self._constants
        work_s = constants.request_s + isl * constants.prompt_token_s
        start_s = max(arrival_s, self._accepted_s)
        self._accepted_s = start_s + work_s
        self._streaming += work_s if self._stream_s else 0.0
        return self._accepted_s + self.streams * constants.active_stream_s

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
        """Pass on one step's tokens; return when the client has them, on average."""
        if not self._stream_s:
            return output_s + self._constants.first_token_s
        self.stream(output_s, output_s, 1, tokens)
        half = tokens * self._stream_s / 2
        return self._streaming - half + self._constants.first_token_s
