"""Engines that keep step: attention-DP ranks, and the micro-batches of a pipeline.

Each schedules for itself, with its own queue, batch and KV cache, but no rank can leave a
step before the slowest has reached its collectives, and the executor goes round a pipeline's
micro-batches in turn. So all steps of a round last as long as the longest: a prompt on one
rank holds up the tokens of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from planner.simulator.chunking import Chunks
from planner.simulator.clock import DecodeSpan
from planner.simulator.engine import Engine, StepTiming


class Lockstep:
    """Drives engines round by round; of one engine it makes what the engine alone does.

    Args:
        engines: In step with each other.
        expert_ranks: Ranks that share the experts, engines without a request among them; 0
            where each engine's step is priced by its own tokens alone.
        exact: Take every round singly.
    """

    def __init__(
        self, engines: Sequence[Engine], *, expert_ranks: int = 0, exact: bool = False
    ) -> None:
        self.engines = engines
        self.expert_ranks = expert_ranks
        self.exact = exact

    def run(self) -> None:
        """Serve until no engine has a request left."""
        while self._advance():
            pass

    def _advance(self) -> bool:
        """Take a round of steps, or several equal rounds; False when all is served."""
        chunks = [engine.plan() for engine in self.engines]
        if any(chunks):
            self._take_mixed_round(chunks)
        elif any(engine.decoding for engine in self.engines):
            self._take_decode_rounds()
        else:
            return self._skip_idle_time()
        return True

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
        for engine, own, step in zip(self.engines, chunks, steps, strict=True):
            if step:
                engine.take_mixed_step(own, step, timing)
            else:
                _take_decode_steps(engine, 1, timing)

    def _take_decode_rounds(self) -> None:
        """Take as many rounds as nothing interrupts on any engine."""
        added_s = self._added_s([0] * len(self.engines))
        spans = [
            engine.decode_span(added_s=extra_s)
            for engine, extra_s in zip(self.engines, added_s, strict=True)
            if engine.decoding
        ]
        slowest = max(spans, key=lambda span: span.seconds(1))
        steps = 1
        if not self.exact:
            steps = min(engine.uninterrupted_steps(slowest) for engine in self.engines)
            steps = _steps_led(slowest, spans, steps)
        # All start at the same time, so any engine can tell when the steps run.
        timing = self.engines[0].decode_timing(slowest, steps)
        for engine in self.engines:
            _take_decode_steps(engine, steps, timing)

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

    def _skip_idle_time(self) -> bool:
        waits = [engine.come_to_rest() for engine in self.engines]
        if any(waits):
            return True
        event_s = min(engine.next_event_s() for engine in self.engines)
        for engine in self.engines:
            engine.wait_until(event_s)
        return event_s < math.inf


def _take_decode_steps(engine: Engine, steps: int, timing: StepTiming) -> None:
    if engine.decoding:
        engine.take_decode_steps(steps, timing)
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
