"""What the engine did, as compact columns: one row for equal steps taken together."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
ShareArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLog:
    """Rows of one or more consecutive steps in which nothing changed but the context."""

    start_s: FloatArray
    end_s: FloatArray
    steps: IntArray
    decoding: IntArray
    """Sequences that decode in each of the steps."""
    context_tokens: IntArray
    """Cached tokens of all of them in the first step."""
    prompts: IntArray
    prompt_tokens: IntArray
    first_step_s: ShareArray
    last_step_s: ShareArray
    """Length of the first and the last of the steps; those between lie on a straight line."""
    output_delay_s: ShareArray
    """How much later than the last step's end its tokens left: the host was launching."""
    stream_delay_s: ShareArray
    """How much later than that they were streamed: the front end was busy."""
    steps_at_once: ShareArray
    """Steps whose tokens a client got in one chunk, on average: the front end was busy.

    Counted where several steps make a row.
    """
    used_units: ShareArray
    """KV blocks (or bytes) that running sequences hold at the start."""
    reserved_units: ShareArray
    waiting: IntArray
    """Requests in the queue at the start."""

    @property
    def num_steps(self) -> int:
        """Engine iterations in all."""
        return int(self.steps.sum())


_COLUMNS = {
    **dict.fromkeys(("output_delay_s", "stream_delay_s"), "f4"),
    **dict.fromkeys(("start_s", "end_s"), "f8"),
    **dict.fromkeys(
        ("steps", "decoding", "context_tokens", "prompts", "prompt_tokens", "waiting"), "i4"
    ),
    **dict.fromkeys(("first_step_s", "last_step_s", "steps_at_once"), "f4"),
    **dict.fromkeys(("used_units", "reserved_units"), "f4"),
}
"""A row as it is packed: the two delays are those of the row before, known only by then."""

_PACKED = Struct("=" + "".join(np.dtype(kind).char for kind in _COLUMNS.values()))


class StepRecorder:
    """Grows a `StepLog` row by row, 68 bytes each."""

    __slots__ = ("_rows", "output_delay_s", "stream_delay_s")

    def __init__(self) -> None:
        self._rows = bytearray()
        self.output_delay_s = 0.0
        """How much later than its end the tokens of the last row's last step left."""
        self.stream_delay_s = 0.0
        """How much later than that they were streamed."""

    def add(self, *columns: float) -> None:
        """Add a row of steps, whose tokens have yet to leave.

        Args:
            columns: Start of the first and end of the last step; steps, decoding, context tokens,
                prompts, prompt tokens, waiting; length of the first and of the last step, steps
                that a client gets at once; used and reserved units of the block pool.
        """
        self._rows += _PACKED.pack(self.output_delay_s, self.stream_delay_s, *columns)
        self.output_delay_s = self.stream_delay_s = 0.0

    def log(self) -> StepLog:
        """Return the rows so far."""
        rows = np.frombuffer(self._rows, np.dtype(list(_COLUMNS.items())))
        columns = {name: rows[name] for name in _COLUMNS}
        for name in ("output_delay_s", "stream_delay_s"):
            last = np.float32(getattr(self, name))
            columns[name] = np.append(columns[name], last)[1:]
        return StepLog(**columns)
