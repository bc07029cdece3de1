"""The cost of a step as scalars: `StepModel` tabulated once, asked once per simulated event.

No physics is written here. Every number comes from the step model; the tables only
interpolate it, within half a percent of the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.step import TOKEN_KNOTS, StepBatch, StepCost
from planner.simulator.curve_table import (
    CurveTable,
    geometric_knots,
    never_falling,
    refined_knots,
)
from planner.simulator.prefill_table import PrefillTable

FloatArray = NDArray[np.float64]

ROWS_AT_ONCE = 16
"""Batch sizes that are tabulated together when the first of them is asked for."""

LARGER_BATCHES = np.array([1.0 + 1e-9, 1.05, 1.25])
"""Larger batches, over the last of those tabulated together, than which these take no more time."""

KV_RATIO = 1.5
"""Spacing of the first grid over cached tokens."""

APART = ("attention_decode", "attention_prefill", "launch", "host")
"""Families that depend on more than the tokens and rows of a step."""


class StepCostModel(Protocol):
    """What the simulator needs of a step model."""

    def cost(self, batch: StepBatch) -> StepCost:
        """Return the time of a step by operator family."""

    def launch_floor_s(self, sequences: ArrayLike, prefill_tokens: ArrayLike) -> FloatArray:
        """Return the host time to launch the step's kernels; 0 for one CUDA graph."""

    def launch_s(self, gpu_s: float, floor_s: float) -> float:
        """Return what launching adds to the GPU time of a step."""


@dataclass(slots=True)
class MixedStep:
    """Work of a step that prefills: what decodes, and the prompts or chunks beside it."""

    decoding: int
    decode_kv_len: float
    """Mean cached tokens of the decoding sequences."""
    prompts: int
    tokens: int
    """New prompt tokens."""
    attended: float
    """Σ q·(past + q/2) over the prompts: query-key pairs, half of the chunk's own square."""

    @property
    def past(self) -> float:
        """Mean past of equal chunks that attend to as many pairs as these unequal ones."""
        return max(self.attended / self.tokens - self.tokens / (2 * self.prompts), 0.0)


@dataclass(slots=True)
class StepTime:
    """How long a step takes, and how much of that is waiting for its launch."""

    seconds: float
    """From an idle GPU and an idle host, launch included."""
    launch_s: float
    """Share of it that a launch ahead of time hides."""
    floor_s: float
    """Host time of the launch."""


class DecodeSpan:
    """Decode steps of one batch: contexts grow by one token a step, nothing else changes.

    The time of k steps is the integral of the interpolant from half a token before the
    first context: the midpoint rule, which is exact for straight lines and telescopes, so
    that any split of the steps adds up to the same.
    """

    __slots__ = ("_added_s", "_before_s", "_first_s", "_room", "_slope_s", "_start", "_table")

    def __init__(self, table: CurveTable, kv_len: float, added_s: float = 0.0) -> None:
        self._table = table
        self._start = kv_len - 0.5
        self._added_s = added_s
        # Most spans stay on one straight piece of the table: it need not be asked again.
        at_start_s, self._slope_s, self._room = table.segment(self._start)
        self._first_s = at_start_s + added_s
        self._before_s: float | None = None
        """Integral up to the start, once it is asked for."""

    def seconds(self, steps: int) -> float:
        """Return the time of the first `steps` steps."""
        if steps <= self._room:
            return steps * (self._first_s + 0.5 * self._slope_s * steps)
        table, start = self._table, self._start
        if self._before_s is None:
            self._before_s = table.integral(start)
        return table.integral(start + steps) - self._before_s + steps * self._added_s

    @property
    def straight_steps(self) -> int:
        """Steps, at least one, whose lengths lie on a straight line."""
        return max(int(min(self._room, 1 << 30)), 1)

    def steps_until(self, wait_s: float, most: int) -> int:
        """Return the least number of steps that end at `wait_s` or later, at most `most`.

        Both loops end: a step takes no less time than the one before it, so that each turn of the
        first is nearer to `wait_s` or at `most`, and the second goes back over few.
        """
        if wait_s <= 0:
            return 0
        if self.seconds(most) < wait_s:
            return most
        steps = min(max(int(wait_s / self._first_s), 1), most)
        while (short_s := wait_s - self.seconds(steps)) > 0:
            step_s = self._table(self._start + steps) + self._added_s
            steps = min(steps + max(int(short_s / step_s), 1), most)
        while steps > 1 and self.seconds(steps - 1) >= wait_s:
            steps -= 1
        return steps


class StepClock:
    """Scalar step costs of one model, configuration and GPU.

    Decode steps are tabulated over cached tokens for each batch size, mixed steps as the
    sum of the parts that `StepCost` tells apart: linear work over tokens, sampled rows,
    decode attention and prefill attention. Tables are made when first asked for.
    """

    def __init__(
        self,
        model: StepCostModel,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        rows_per_sequence: float = 1.0,
    ) -> None:
        self.model = model
        self._rows_per_sequence = rows_per_sequence
        self._max_rows = max_batch_size
        self._max_tokens = max_num_tokens
        self._max_kv_len = max(max_seq_len, 2)
        self._decode: list[_DecodeRow | None] = [None] * (max_batch_size + ROWS_AT_ONCE + 1)
        self._mixed: _MixedTables | None = None
        self._shared: CurveTable | None = None

    @property
    def _most_rows(self) -> int:
        """Rows of a full batch that decodes."""
        return math.ceil(self._max_rows * self._rows_per_sequence)

    def relaunched(self, model: StepCostModel) -> StepClock:
        """Return the clock of a model that differs only in what launching mixed steps takes.

        All but two of the tables are shared, those yet to be made among them.
        """
        clock = copy(self)
        clock.model = model
        if self._mixed is not None:
            last = self._max_tokens + self._most_rows
            clock._mixed = replace(self._mixed, **_launch_tables(model, last))
        return clock

    def decode_span(self, sequences: int, kv_len: float, *, added_s: float = 0.0) -> DecodeSpan:
        """Return consecutive decode steps of one batch, from mean cached tokens on."""
        row = self._decode[sequences] or self._tabulated(sequences)
        return DecodeSpan(row.step_s, kv_len, added_s)

    def sharing_s(self, tokens: int, rank_tokens: float) -> float:
        """Return what is added to a step of so many tokens where attention-DP ranks differ.

        The experts work on what the ranks bring on average; negative where that is less.
        """
        table = self._shared or self._tabulated_shared()
        return table(rank_tokens) - table(tokens)

    def mixed(self, step: MixedStep, *, added_s: float = 0.0) -> StepTime:
        """Return the time of a step that prefills."""
        tables = self._mixed or self._tabulated_mixed()
        decoded = step.decoding * self._rows_per_sequence
        sampled, running = decoded + step.prompts, step.decoding + step.prompts
        gpu_s = tables.linear_s(decoded + step.tokens) + tables.rows_s(sampled)
        gpu_s += tables.attention_s(step.prompts, step.tokens / step.prompts, step.past)
        if step.decoding:
            row = self._decode[step.decoding] or self._tabulated(step.decoding)
            gpu_s += row.attention_s(step.decode_kv_len)
        gpu_s += added_s
        floor_s = tables.floor_s(decoded + step.tokens)
        floor_s += tables.floor_per_sequence_s * step.decoding
        launch_s = self.model.launch_s(gpu_s, floor_s)
        seconds = gpu_s + launch_s + tables.host_s(running)
        return StepTime(seconds, launch_s, floor_s)

    def _tabulated(self, sequences: int) -> _DecodeRow:
        """Tabulate the decode step for this batch size and its neighbours."""
        first = (sequences - 1) // ROWS_AT_ONCE * ROWS_AT_ONCE + 1
        own = np.arange(first, first + ROWS_AT_ONCE, dtype=np.float64)
        larger = np.ceil(own[-1] * LARGER_BATCHES)
        batches = np.concatenate([own, larger[larger <= self._max_rows]])[:, None]

        def cost(kv_len: FloatArray) -> StepCost:
            return self.model.cost(StepBatch(decode_sequences=batches, decode_kv_len=kv_len))

        knots, seconds = refined_knots(
            lambda kv_len: cost(kv_len).seconds, geometric_knots(1, self._max_kv_len, KV_RATIO)
        )
        attention = np.broadcast_to(cost(knots).by_family["attention_decode"], seconds.shape)
        seconds, attention = (
            never_falling(never_falling(times).T).T for times in (seconds, attention)
        )
        for offset in range(ROWS_AT_ONCE):
            if first + offset < len(self._decode):
                self._decode[first + offset] = _DecodeRow(
                    step_s=CurveTable(knots, seconds[offset]),
                    attention_s=CurveTable(knots, attention[offset]),
                )
        row = self._decode[sequences]
        if row is None:
            raise ValueError(f"{sequences=} exceeds the clock's max_batch_size={self._max_rows}")
        return row

    def _tabulated_shared(self) -> CurveTable:
        """Tabulate what hangs on the tokens of all attention-DP ranks."""

        def shared_of(rank_tokens: FloatArray) -> FloatArray:
            cost = self.model.cost(
                StepBatch(prefill_sequences=1, prefill_tokens=1, rank_tokens=rank_tokens)
            )
            return _outside_attention(cost, rank_tokens)

        last = self._max_tokens + self._most_rows
        knots = np.append(TOKEN_KNOTS[: TOKEN_KNOTS.searchsorted(last)], last)
        self._shared = CurveTable(*refined_knots(shared_of, knots))
        return self._shared

    def _tabulated_mixed(self) -> _MixedTables:
        self._mixed = _mixed_tables(
            self.model,
            max_sequences=self._max_rows,
            max_rows=self._most_rows,
            max_tokens=self._max_tokens,
            max_past=self._max_kv_len,
        )
        return self._mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeRow:
    """One batch size, over mean cached tokens."""

    step_s: CurveTable
    attention_s: CurveTable


@dataclass(frozen=True, slots=True, kw_only=True)
class _MixedTables:
    """The parts of a mixed step."""

    linear_s: CurveTable
    """GPU time outside attention with one sampled row, over tokens."""
    rows_s: CurveTable
    """What further sampled rows add, over rows."""
    host_s: CurveTable
    """Host time that nothing hides, over rows."""
    floor_s: CurveTable
    """Launch floor over tokens, those of decoding sequences among them, were none to decode."""
    floor_per_sequence_s: float
    attention_s: PrefillTable


def _mixed_tables(
    model: StepCostModel, *, max_sequences: int, max_rows: int, max_tokens: int, max_past: int
) -> _MixedTables:
    """Take the step model apart: one direction at a time, attention in three."""

    def prefill(prompts: ArrayLike, tokens: ArrayLike, past: ArrayLike = 0.0) -> StepCost:
        return model.cost(
            StepBatch(prefill_sequences=prompts, prefill_tokens=tokens, prefill_past=past)
        )

    def rows_of(prompts: FloatArray) -> FloatArray:
        return _outside_attention(prefill(prompts, max_tokens), prompts)

    def host_of(prompts: FloatArray) -> FloatArray:
        host = prefill(prompts, max_tokens).by_family.get("host", np.zeros(()))
        return np.broadcast_to(host, prompts.shape)

    few = TOKEN_KNOTS[: TOKEN_KNOTS.searchsorted(2 * max_rows) + 2]
    rows, at_rows = refined_knots(rows_of, few)
    return _MixedTables(
        linear_s=_token_curve(
            lambda m: _outside_attention(prefill(1, m), m), max_tokens + max_rows
        ),
        rows_s=CurveTable(rows, at_rows - at_rows[0]),
        host_s=_token_curve(host_of, 2 * max_rows),
        **_launch_tables(model, max_tokens + max_rows),
        attention_s=PrefillTable(
            lambda prompts, chunk, past: prefill(prompts, prompts * chunk, past).by_family[
                "attention_prefill"
            ],
            max_prompts=max_sequences,
            max_chunk=max_tokens,
            max_past=max_past,
        ),
    )


def _launch_tables(model: StepCostModel, last: int) -> dict[str, Any]:
    """Return the tables that hang on launches alone."""

    def floor_of(tokens: FloatArray) -> FloatArray:
        return np.broadcast_to(model.launch_floor_s(0.0, tokens), tokens.shape)

    floors = model.launch_floor_s(np.array([0.0, 1.0]), float(last))
    return {
        "floor_s": _token_curve(floor_of, last),
        "floor_per_sequence_s": float(floors[1] - floors[0]) if np.size(floors) > 1 else 0.0,
    }


def _token_curve(function: Callable[[FloatArray], FloatArray], last: int) -> CurveTable:
    """Tabulate over numbers of tokens up to the last."""
    knots = np.append(TOKEN_KNOTS[: TOKEN_KNOTS.searchsorted(last)], last)
    return CurveTable(*refined_knots(function, knots))


def _outside_attention(cost: StepCost, like: FloatArray) -> FloatArray:
    """GPU time of everything but attention, launch and host, in the shape of `like`."""
    parts = (seconds for family, seconds in cost.by_family.items() if family not in APART)
    return sum((np.broadcast_to(part, like.shape) for part in parts), np.zeros(like.shape))
