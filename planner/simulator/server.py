"""One server: a front end before one scheduler instance, and the loop that drives both.

A server is driven in one of two ways, with the same result. Alone it pulls requests from its own
source (`Server.run`). Behind a router (`planner.simulator.fleet`) requests are submitted to it at
their time of arrival: it proposes decode steps as far as nothing that it knows interrupts them,
and whatever is submitted before they are due shortens the proposal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.errors import SimulationStalledError
from cost_models.frontend import FrontEndConstants
from planner.simulator.arrivals import ArrivalSource
from planner.simulator.engine import Engine, StepTiming
from planner.simulator.front_end import FrontEnd
from planner.simulator.recorder import RequestRecorder


@dataclass(slots=True)
class Proposal:
    """Decode steps that are taken unless something comes before the next step is planned."""

    steps: int
    timing: StepTiming


class Server(ABC):
    """What servers of one and of several scheduler instances have in common.

    Args:
        engines: Scheduler instances behind the front end.
        source: Where its requests come from.
        results: Where their times are written.
        constants: What the front end costs.
        exact: Take every step singly: slow, and the same result to rounding.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        source: ArrivalSource,
        results: RequestRecorder,
        constants: FrontEndConstants,
        *,
        exact: bool = False,
    ) -> None:
        self.engines = engines
        self.source = source
        self.results = results
        self.exact = exact
        self.front_end = FrontEnd(constants)
        self._first_token_s = constants.first_token_s
        self._isl = engines[0].requests.isl.data
        self._proposal: Proposal | None = None
        self._is_resting = True
        self._stalls = 0
        """Plans in a row that took no step although requests wait."""

    def run(self) -> None:
        """Serve what the source gives until no request is left."""
        while True:
            self._plan()
            if self._proposal is not None:
                self._commit()
            elif self._is_resting:
                event_s = self._next_event_s()
                if event_s == math.inf:
                    return
                self._wait_until(event_s)

    # Behind a router

    @property
    def next_s(self) -> float:
        """When the next step is planned, as far as is known; infinite if nothing is left to do."""
        if self._proposal is not None:
            return self._proposal.timing.scheduled_s
        scheduled_s = self.engines[0].scheduled_s
        return max(scheduled_s, self._next_event_s()) if self._is_resting else scheduled_s

    def settle(self) -> bool:
        """Let the tokens leave that are made by the time of `next_s`; return whether there are any.

        Without overlap scheduling a step is planned in the moment in which the step before it
        ends: clients may answer its tokens in time for that plan.
        """
        engine = self.engines[0]
        if engine.overlap:
            return False
        if self._proposal is not None:
            self._commit()
        has_tokens = any(engine.unsent_tokens for engine in self.engines)
        self._send(engine.end_s)
        return has_tokens

    def advance(self) -> None:
        """Take what was proposed and plan the next step, at the time of `next_s`."""
        if self._proposal is not None:
            self._commit()
        elif self._is_resting:
            self._wait_until(self._next_event_s())
        self._plan()

    def interrupt(self) -> None:
        """Learn that the source has a new request: propose no steps beyond its arrival."""
        if self._proposal is not None:
            self._proposal = self._propose()

    # One step

    @abstractmethod
    def _plan(self) -> None:
        """See what has come, and take a step that prefills, propose decode steps, or rest."""

    @abstractmethod
    def _propose(self) -> Proposal:
        """Return the decode steps until something that is known interrupts them."""

    @abstractmethod
    def _commit(self) -> None:
        """Take the proposed steps."""

    @abstractmethod
    def _send(self, output_s: float) -> None:
        """The tokens of the last step planned leave the engine."""

    @abstractmethod
    def _engine_for(self, index: int) -> Engine:
        """Return the scheduler instance that serves a request which has passed the front end."""

    def _next_event_s(self) -> float:
        """Return when a client or the front end next does something."""
        return min(self.source.next_s, self.front_end.next_s)

    def _see_arrivals(self, now_s: float) -> None:
        """Move requests through the front end into the queue, as far as the plan sees them."""
        source, front_end = self.source, self.front_end
        while source.next_s <= now_s:
            self._accept(source.next_s, source.take())
        if front_end.next_s <= now_s:
            for index in front_end.passed(now_s):
                self._engine_for(index).queue(index)

    def _accept(self, arrival_s: float, index: int) -> None:
        """A client has sent a request: pass it on, or turn it away."""
        if self.turns_away(arrival_s, index):
            self.source.finished(arrival_s)
        else:
            self.front_end.accept(arrival_s, index, self._isl[index])

    def turns_away(self, arrival_s: float, index: int) -> bool:
        """Note a request's arrival, and return whether the engine refuses it."""
        self.results.arrive(index, arrival_s)
        refusal = self.engines[0].refusal(index)
        if refusal:
            self.results.refuse(index, refusal)
        return bool(refusal)

    def _deliver(self, engine: Engine, output_s: float, streamed_s: float) -> None:
        """Clients have the tokens of an engine's last step planned."""
        engine.sent(output_s, streamed_s)
        delivered_s = streamed_s + self._first_token_s
        if engine.unsent_first:
            for request in engine.unsent_first:
                self.front_end.begin_stream()
                self.results.first_token(request.index, delivered_s)
            engine.unsent_first.clear()
        if engine.unsent_last:
            for request in engine.unsent_last:
                self.front_end.end_stream()
                self.results.last_token(request.index, delivered_s)
                self.source.finished(delivered_s)
            engine.unsent_last.clear()

    def _streamed_at_once(self, proposal: Proposal, tokens: int) -> float:
        """Stream all proposed steps but the last; return the steps that clients get at once."""
        steps, timing = proposal.steps, proposal.timing
        if steps == 1:
            return 1.0
        first_end_s = timing.start_s + timing.first_s
        last_start_s = timing.start_s + timing.until_last_s
        return self.front_end.stream(first_end_s, last_start_s, steps - 1, tokens)

    def _rest(self) -> None:
        """Nothing runs: free what is left of the last step; plan anew only where somebody waits.

        Raises:
            SimulationStalledError: Somebody waits though the engine is empty, and will for ever.
        """
        self._send(self.engines[0].end_s)
        waits = [engine.come_to_rest() for engine in self.engines]
        self._is_resting = not any(waits)
        self._stalls = 0 if self._is_resting else self._stalls + 1
        if self._stalls > 1:
            num_waiting = sum(engine.waiting.count for engine in self.engines)
            raise SimulationStalledError(
                f"{num_waiting} requests wait at {self.engines[0].scheduled_s:.3f} s "
                "for an engine that is empty",
                hint="its KV cache or limits cannot hold them: raise max_num_tokens or the cache",
            )

    def _wait_until(self, event_s: float) -> None:
        self._is_resting = False
        for engine in self.engines:
            engine.wait_until(event_s)


class SingleServer(Server):
    """A server of one scheduler instance."""

    def __init__(
        self,
        engine: Engine,
        source: ArrivalSource,
        results: RequestRecorder,
        constants: FrontEndConstants,
        *,
        exact: bool = False,
    ) -> None:
        super().__init__((engine,), source, results, constants, exact=exact)
        self.engine = engine

    def _plan(self) -> None:
        engine = self.engine
        if not engine.overlap:
            self._send(engine.end_s)
        engine.release_due()
        self._see_arrivals(engine.scheduled_s)
        chunks = engine.plan()
        if chunks:
            self._stalls, self._is_resting = 0, False
            step = engine.mixed_step(chunks)
            timing = engine.mixed_timing(step)
            self._send(timing.output_s)
            engine.take_mixed_step(chunks, step, timing)
        elif engine.decoding:
            self._proposal, self._is_resting = self._propose(), False
        else:
            self._rest()

    def _propose(self) -> Proposal:
        engine = self.engine
        span = engine.decode_span()
        steps = 1
        if not self.exact:
            # Whoever has the last token of the step before may send the next request.
            self._send(engine.end_s)
            steps = engine.uninterrupted_steps(span, self._next_event_s())
        return Proposal(steps, engine.decode_timing(span, steps))

    def _commit(self) -> None:
        proposal, engine = self._proposal, self.engine
        assert proposal is not None  # noqa: S101  both callers have looked
        self._proposal, self._stalls = None, 0
        self._send(proposal.timing.output_s)
        at_once = self._streamed_at_once(proposal, engine.decoding)
        engine.take_decode_steps(proposal.steps, proposal.timing, at_once)

    def _send(self, output_s: float) -> None:
        engine = self.engine
        if engine.unsent_tokens:
            streamed_s = self.front_end.deliver(output_s, engine.unsent_tokens)
            self._deliver(engine, output_s, streamed_s)

    def _engine_for(self, index: int) -> Engine:  # noqa: ARG002  there is only one
        return self.engine
