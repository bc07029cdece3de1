"""The clock of an engine that speculates, in steps of one token: see `SpeculativeStep`."""

from __future__ import annotations

from dataclasses import replace

from cost_models.speculation import SpeculativeStep
from cost_models.step import TOKEN_KNOTS, StepModel
from planner.simulator.clock import MixedStep, StepClock, StepTime
from planner.simulator.curve_table import CurveTable, refined_knots


class SpeculativeClock(StepClock):
    """Scalar step costs under speculation.

    Decode steps are tabulated from the step model as any other's. A step that prefills is put
    together from three clocks: the target over the rows that it verifies, the draft's first pass
    over the same tokens, and its further passes over one token of each sequence.
    """

    def __init__(
        self, model: SpeculativeStep, *, max_batch_size: int, max_num_tokens: int, max_seq_len: int
    ) -> None:
        limits = {
            "max_batch_size": max_batch_size,
            "max_num_tokens": max_num_tokens,
            "max_seq_len": max_seq_len,
        }
        super().__init__(model, **limits)

        def clock(step: StepModel) -> StepClock:
            return StepClock(step, **limits, rows_per_sequence=step.rows_per_sequence)

        self._speculation = model.speculation
        self._verify = clock(model.verify)
        self._passes = (clock(model.draft), clock(model.further_pass)) if model.draft else None
        knots = TOKEN_KNOTS[: TOKEN_KNOTS.searchsorted(max_num_tokens) + 1]
        self._joining_s = CurveTable(*refined_knots(model.joining_s, knots))
        self._searched_token_s = float(model.search_s(1.0))
        self._judged_sequence_s = float(model.judging_s(1.0))
        self._sequences_s = CurveTable(
            *refined_knots(lambda n: model.heads_s(n) + model.bare_host_s(n), knots)
        )

    def mixed(self, step: MixedStep, *, added_s: float = 0.0) -> StepTime:
        """Return the time of a step that prefills, as one in which sequences gain one token."""
        verified = self._verify.mixed(step, added_s=added_s)
        running = step.decoding + step.prompts
        seconds = verified.seconds + self._sequences_s(running) + self._drafting_s(step, running)
        seconds += self._judged_sequence_s * step.decoding
        if step.decoding:
            step_s = self.decode_span(step.decoding, step.decode_kv_len).seconds(1)
            seconds -= (self._speculation.tokens_per_step - 1) * step_s
        return replace(verified, seconds=seconds)

    def _drafting_s(self, step: MixedStep, running: int) -> float:
        """Return the time to draft behind a step that prefills: passes, or a search."""
        cached = step.decoding * step.decode_kv_len + step.prompts * step.past + step.tokens
        if self._passes is None:
            return self._searched_token_s * cached
        first, further = self._passes
        further_s = further.decode_span(running, cached / running).seconds(1)
        rows = step.decoding * self._speculation.rows_per_sequence + step.tokens
        first_s = first.mixed(step).seconds + self._joining_s(rows)
        num_further = self._speculation.max_draft_len - 1
        return first_s + num_further * (further_s + self._joining_s(running))
