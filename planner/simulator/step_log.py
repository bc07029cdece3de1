"""What the engine did, as compact columns: one row for equal steps taken together."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

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


class StepRecorder:
    """Grows a `StepLog` row by row, 68 bytes each."""

    __slots__ = ("_counts", "_shares", "_times")

    def __init__(self) -> None:
        self._times = array("d")
        self._counts = array("i")
        self._shares = array("f")

    def add(
        self,
        span_s: tuple[float, float],
        counts: tuple[int, int, int, int, int, int],
        units: tuple[int, int],
        ends_s: tuple[float, float],
    ) -> None:
        """Add a row.

        Args:
            span_s: Start of the first and end of the last step.
            counts: Steps, decoding, context tokens, prompts, prompt tokens, waiting.
            units: Used and reserved in the block pool.
            ends_s: Length of the first and of the last step.
        """
        self._times.extend(span_s)
        self._counts.extend(counts)
        self._shares.extend((*ends_s, 0.0, 0.0, 1.0, *units))

    def delay_last(self, delay_s: float) -> None:
        """Note that the tokens of the last row's last step left late."""
        self._shares[-5] = delay_s

    def stream_last(self, delay_s: float) -> None:
        """Note that the front end was late with the tokens of the last row's last step."""
        self._shares[-4] = delay_s

    def merge_last(self, steps_at_once: float) -> None:
        """Note how many of the last row's steps a client saw at once."""
        self._shares[-3] = steps_at_once

    def log(self) -> StepLog:
        """Return the rows so far."""
        times = np.frombuffer(self._times, np.float64).reshape(-1, 2)
        counts = np.frombuffer(self._counts, np.int32).reshape(-1, 6)
        shares = np.frombuffer(self._shares, np.float32).reshape(-1, 7)
        return StepLog(
            start_s=times[:, 0],
            end_s=times[:, 1],
            steps=counts[:, 0],
            decoding=counts[:, 1],
            context_tokens=counts[:, 2],
            prompts=counts[:, 3],
            prompt_tokens=counts[:, 4],
            waiting=counts[:, 5],
            first_step_s=shares[:, 0],
            last_step_s=shares[:, 1],
            output_delay_s=shares[:, 2],
            stream_delay_s=shares[:, 3],
            steps_at_once=shares[:, 4],
            used_units=shares[:, 5],
            reserved_units=shares[:, 6],
        )
