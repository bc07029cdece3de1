"""A server of several scheduler instances in step: attention-DP ranks, a pipeline's micro-batches.

Each schedules for itself, with its own queue, batch and KV cache, but no rank can leave a
step before the slowest has reached its collectives, and the executor goes round a pipeline's
micro-batches in turn. So all steps of a round last as long as the longest: a prompt on one
rank holds up the tokens of all. One front end serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cost_models.frontend import FrontEndConstants
from planner.simulator.arrivals import ArrivalSource
from planner.simulator.chunking import Chunks
from planner.simulator.clock import DecodeSpan
from planner.simulator.engine import Engine, StepTiming
from planner.simulator.recorder import RequestRecorder
from planner.simulator.server import Proposal, Server


class LockstepServer(Server):
    """Drives scheduler instances round by round; of one it makes what a `SingleServer` makes.

    A request goes to the instance that holds the fewest, as TensorRT-LLM's attention-DP scheduling
    and vLLM's data-parallel coordinator choose; of equals to the next in turn.

    Args:
        engines: In step with each other.
        source: Where its requests come from.
        results: Where their times are written.
        constants: What the front end costs.
        expert_ranks: Ranks that share the experts, engines without a request among them; 0
            where each engine's step is priced by its own tokens alone.
        exact: Take every round singly.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        source: ArrivalSource,
        results: RequestRecorder,
        constants: FrontEndConstants,
        *,
        expert_ranks: int = 0,
        exact: bool = False,
    ) -> None:
        super().__init__(engines, source, results, constants, exact=exact)
        self.expert_ranks = expert_ranks
        self._next_turn = 0

    def _plan(self) -> None:
        """Take a round that prefills, propose rounds that decode, or rest."""
        first = self.engines[0]
        if not first.overlap:
            self._send(first.end_s)
        for engine in self.engines:
            engine.release_due()
        self._see_arrivals(first.scheduled_s)
        chunks = [engine.plan() for engine in self.engines]
        if any(chunks):
            self._stalls, self._is_resting = 0, False
            self._take_mixed_round(chunks)
        elif any(engine.decoding for engine in self.engines):
            self._proposal, self._is_resting = self._propose(), False
        else:
            self._rest()

    def _engine_for(self, index: int) -> Engine:  # noqa: ARG002  only counts decide
        turn, number = self._next_turn, len(self.engines)
        ranks = [(turn + offset) % number for offset in range(number)]
        chosen = min(ranks, key=lambda rank: self.engines[rank].num_held)
        self._next_turn = (chosen + 1) % number
        return self.engines[chosen]

    def _take_mixed_round(self, chunks: Sequence[Chunks]) -> None:
        """Take one round in which at least one engine prefills."""
        steps = [
            engine.mixed_step(own) if own else None
            for engine, own in zip(self.engines, chunks, strict=True)
        ]
        tokens = [step.tokens if step else 0 for step in steps]
        timing = _longest(
            engine.mixed_timing(step, added_s=added_s)
            if step
            else engine.decode_timing(engine.decode_span(added_s=added_s), 1)
            for engine, step, added_s in zip(
                self.engines, steps, self._added_s(tokens), strict=True
            )
            if step or engine.decoding
        )
        # Before any engine makes new tokens: those of the round before leave together.
        self._send(timing.output_s)
        for engine, own, step in zip(self.engines, chunks, steps, strict=True):
            if step:
                engine.take_mixed_step(own, step, timing)
            else:
                _take_decode_steps(engine, 1, timing, 1.0)

    def _propose(self) -> Proposal:
        """Return as many rounds as nothing interrupts on any engine."""
        added_s = self._added_s([0] * len(self.engines))
        spans = [
            engine.decode_span(added_s=extra_s)
            for engine, extra_s in zip(self.engines, added_s, strict=True)
            if engine.decoding
        ]
        slowest = max(spans, key=lambda span: span.seconds(1))
        steps = 1
        if not self.exact:
            self._send(self.engines[0].end_s)
            event_s = self._next_event_s()
            steps = min(engine.uninterrupted_steps(slowest, event_s) for engine in self.engines)
            steps = _steps_led(slowest, spans, steps)
        # All start at the same time, so any engine can tell when the steps run.
        return Proposal(steps, self.engines[0].decode_timing(slowest, steps))

    def _commit(self) -> None:
        proposal = self._proposal
        assert proposal is not None  # noqa: S101  both callers have looked
        self._proposal, self._stalls = None, 0
        self._send(proposal.timing.output_s)
        tokens = sum(engine.decoding for engine in self.engines)
        at_once = self._streamed_at_once(proposal, tokens)
        for engine in self.engines:
            _take_decode_steps(engine, proposal.steps, proposal.timing, at_once)

    def _send(self, output_s: float) -> None:
        """The tokens of the last round leave all engines, through one front end."""
        tokens = sum(engine.unsent_tokens for engine in self.engines)
        if not tokens:
            return
        streamed_s = self.front_end.deliver(output_s, tokens)
        for engine in self.engines:
            if engine.unsent_tokens:
                self._deliver(engine, output_s, streamed_s)

    def _added_s(self, prompt_tokens: Sequence[int]) -> list[float]:
        """Return by how much each engine's step is longer for sharing its experts."""
        if not self.expert_ranks:
            return [0.0] * len(self.engines)
        tokens = [
            engine.decoding + prompts
            for engine, prompts in zip(self.engines, prompt_tokens, strict=True)
        ]
        rank_tokens = sum(tokens) / self.expert_ranks
        return [
            engine.clock.sharing_s(own, rank_tokens)
            for engine, own in zip(self.engines, tokens, strict=True)
        ]


def _take_decode_steps(engine: Engine, steps: int, timing: StepTiming, at_once: float) -> None:
    if engine.decoding:
        engine.take_decode_steps(steps, timing, at_once)
    else:
        engine.take_no_step(steps, timing)


def _longest(timings: Iterable[StepTiming]) -> StepTiming:
    """Return the timing of a round: its step ends, and is planned, with the last."""
    rounds = list(timings)
    start_s = max(timing.start_s for timing in rounds)
    end_s = max(timing.end_s for timing in rounds)
    return StepTiming(
        output_s=max(timing.output_s for timing in rounds),
        start_s=start_s,
        end_s=end_s,
        scheduled_s=max(timing.scheduled_s for timing in rounds),
        first_s=end_s - start_s,
        until_last_s=0.0,
    )


def _steps_led(slowest: DecodeSpan, spans: Sequence[DecodeSpan], steps: int) -> int:
    """Return the steps, of at most so many, of which each is longest in the same span.

    Lengths on straight lines can change their order once: what leads in the first and in
    the last step has led throughout.
    """
    steps = min([steps, *(span.straight_steps for span in spans)])
    while steps > 1 and any(_last_s(span, steps) > _last_s(slowest, steps) for span in spans):
        steps //= 2
    return steps


def _last_s(span: DecodeSpan, steps: int) -> float:
    return span.seconds(steps) - span.seconds(steps - 1)
