"""One scheduler instance: what a step holds, how long it takes, and what it leaves behind.

A server (`planner.simulator.server`) has one of them, or one for each attention-DP rank and
pipeline micro-batch (`planner.simulator.lockstep`), and drives them.

Between two events (an arrival that can be seen, an admission, a sequence that ends, a block
that is not there) only contexts grow, so decode steps are added up in closed form. The exact
mode takes each step singly and gives the same result.

Under overlap scheduling step m is planned when the output of step m − 2 is out, while step
m − 1 runs. So an arrival, a freed slot and a freed block are seen one step late, and the
host launches a step's kernels ahead of time. A host that launches for long delays the
output of the step before.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from cost_models.frontend import FrontEndConstants
from planner.simulator.chunking import Chunks
from planner.simulator.clock import DecodeSpan, MixedStep, StepClock
from planner.simulator.kv_manager import KvManager
from planner.simulator.limits import EngineLimits, Refusal
from planner.simulator.queue_order import WaitingQueue
from planner.simulator.recorder import RequestRecorder
from planner.simulator.request import Request
from planner.simulator.requests import Requests
from planner.simulator.step_log import StepRecorder

MOST_STEPS = 1 << 30
"""Of an engine that nothing interrupts."""


@dataclass(slots=True)
class StepTiming:
    """When the next step, or several equal ones, run; seconds."""

    output_s: float
    """When the tokens of the step before leave."""
    start_s: float
    end_s: float
    scheduled_s: float
    """When the step after them is planned."""
    first_s: float
    """Length of the first step, and of all but the last."""
    until_last_s: float


class Engine:
    """One scheduler instance: its queue, its batch, its KV cache and its clock.

    A step is planned, timed and taken apart from each other, so that instances can be made to
    keep step (`planner.simulator.lockstep`).

    Args:
        requests: Every request of the deployment, by index.
        results: Where their times are written.
        clock: Step costs.
        limits: Batch, tokens, KV blocks and policies.
        constants: How far scheduling runs ahead, and how many slots are held too long.
        number: Of this instance among all of the deployment.
    """

    def __init__(
        self,
        requests: Requests,
        results: RequestRecorder,
        *,
        clock: StepClock,
        limits: EngineLimits,
        constants: FrontEndConstants,
        number: int = 0,
    ) -> None:
        self.requests = requests
        self.number = number
        # Read one by one: through a view a number costs a fifth of what NumPy takes.
        self._isl, self._osl = requests.isl.data, requests.osl.data
        self._max_tokens = requests.max_tokens.data
        self.clock = clock
        self.limits = limits
        reuse = limits.enable_block_reuse and requests.prefix_hashes is not None
        self.kv = KvManager(
            limits.pool,
            reuse_hash_tokens=requests.prefix_hash_tokens if reuse else 0,
            host_blocks=limits.host_blocks,
        )
        self.results = results
        self.steps = StepRecorder()
        self.waiting = WaitingQueue(limits.order, self.kv)
        self.slots = max(limits.max_batch_size - constants.slot_lag, 1)
        self._reserves = limits.capacity.reserves
        self.overlap = limits.overlap and constants.steps_in_flight > 1
        """Whether a step is planned while the one before it runs."""
        self._lag = 1 if self.overlap else 0
        """Steps between an event and the first step that is planned with it."""
        self._steps_taken = 0
        self.scheduled_s = 0.0
        """When the next step is planned: what has come by then is seen."""
        self.end_s = 0.0
        """When the last step planned ends on the GPU."""
        self._prefilling: list[Request] = []
        self._started: dict[Request, None] = {}
        """Requests that hold KV blocks, in order of admission."""
        self._queued = 0
        self._admissions = 0
        self._finishing: list[tuple[int, int, Request]] = []
        """Heap of decoding requests by the step that makes their last token."""
        self.decoding = 0
        """Sequences that decode in the next step."""
        self._context_tokens = 0
        """Cached tokens of the decoding sequences in the next step, its own included."""
        self._leaving: deque[tuple[int, Request]] = deque()
        """Ended requests whose slot and blocks are free when that many steps are taken."""
        self.unsent_first: list[Request] = []
        self.unsent_last: list[Request] = []
        """Requests whose first or last token was made in the last step planned."""
        self.unsent_tokens = 0

    @property
    def num_held(self) -> int:
        """Requests that wait or run, and those that still hold their slot."""
        return self.waiting.count + len(self._started) + len(self._leaving)

    def queue(self, index: int) -> None:
        """A request has passed the front end: it waits for a slot and for KV blocks."""
        self.results.served_by[index] = self.number
        request = self._request(index)
        request.place = self._queued
        self._queued += 1
        self.waiting.push(request)

    def plan(self) -> Chunks:
        """Admit what waits, and return what is prefilled in the next step."""
        if not self._reserves and self.decoding:
            self._make_room_to_grow()
        if self.waiting.count:
            self._admit()
        return self._chunks() if self._prefilling else []

    def release_due(self) -> None:
        """Give back slots and blocks of requests that ended long enough ago."""
        leaving = self._leaving
        while leaving and leaving[0][0] <= self._steps_taken:
            self.kv.release(leaving.popleft()[1])

    def refusal(self, index: int) -> Refusal:
        """Return why the engine turns a request away when it comes, if it does."""
        return self.limits.refusal(isl=self._isl[index], max_tokens=self._max_tokens[index])

    def _request(self, index: int) -> Request:
        """Make the request that the engine works on; outputs end at max_seq_len."""
        columns, isl = self.requests, self._isl[index]
        longest = self.limits.max_seq_len - isl
        request = Request(
            index=index,
            arrival_s=self.results.arrival_s[index],
            isl=isl,
            osl=min(self._osl[index], longest),
            max_tokens=min(self._max_tokens[index], longest),
        )
        if columns.priority is not None:
            request.priority = int(columns.priority[index])
        if columns.predicted_osl is not None:
            request.predicted_osl = float(columns.predicted_osl[index])
        if self.kv.cache is not None and columns.prefix_hashes is not None:
            full = isl // columns.prefix_hash_tokens
            request.hashes = tuple(columns.prefix_hashes[index][:full])
            if self.limits.enable_partial_reuse:
                request.prefix_tail = columns.prefix_tail_tokens
        return request

    # Admission and chunks

    def _admit(self) -> None:
        """Give slots and blocks to waiting requests until the first that does not fit."""
        capacity, waiting, kv = self.limits.capacity, self.waiting, self.kv
        active = len(self._started) + len(self._leaving)
        if not capacity.opens(active=active):
            return
        free_slots = self.slots - active
        growth = 0 if self._reserves else kv.pool.growth(self._steps_taken, 1)
        while waiting.count and free_slots > 0:
            request = waiting.first()
            if kv.must_wait(request) or not capacity.fits(request, kv, growth_units=growth):
                return
            if capacity.within_budget and not self._reached(request):
                return
            waiting.remove(request)
            self._start(request)
            free_slots -= 1

    def _reached(self, request: Request) -> bool:
        """Whether what others leave of this step's budget lets the prompt begin."""
        budget = self._budget() - sum(r.remaining_prefill for r in self._prefilling)
        if self.limits.chunks or request.generated:
            return budget > 0
        return request.remaining_prefill <= budget

    def _start(self, request: Request) -> None:
        request.order = self._admissions
        self._admissions += 1
        self.kv.admit(request, reserving=self._reserves)
        self._prefilling.append(request)
        self._started[request] = None

    def _budget(self) -> int:
        limits = self.limits
        return limits.max_num_tokens - math.ceil(self.decoding * limits.tokens_per_decode)

    def _chunks(self) -> Chunks:
        return self.limits.chunking.divide(self._prefilling, self._budget())

    # Blocks run out

    def _make_room_to_grow(self) -> None:
        """Pause the last started until the decoding sequences can open their next blocks."""
        pool, kv = self.kv.pool, self.kv
        while self.decoding and pool.growth(self._steps_taken, 1) > kv.room(reserving=False):
            self._pause(next(reversed(self._started)))

    def _pause(self, request: Request) -> None:
        """Take a request's blocks away; what it has generated is computed again later."""
        if request.finish_step >= 0:
            self._stop_decoding(request)
            request.generated = request.context_offset + self._steps_taken - request.isl + 1
            request.prefill_len = request.isl + request.generated
            self.results.pause(request.index, self.end_s)
        else:
            self._prefilling.remove(request)
        request.prefilled = 0
        del self._started[request]
        self.kv.release(request)
        self.results.preempt(request.index)
        self.waiting.push_first(request)

    # Steps

    def mixed_step(self, chunks: Chunks) -> MixedStep:
        """Return the work of a step that prefills, beside whatever decodes."""
        tokens, attended = 0, 0.0
        for request, chunk in chunks:
            tokens += chunk
            attended += chunk * (request.prefilled + 0.5 * chunk)
        kv_len = self._context_tokens / self.decoding if self.decoding else 0.0
        return MixedStep(self.decoding, kv_len, len(chunks), tokens, attended)

    def mixed_timing(self, step: MixedStep, *, added_s: float = 0.0) -> StepTiming:
        """Return when the next step runs if it is this one."""
        time = self.clock.mixed(step, added_s=added_s)
        output_s = self.end_s
        if self.overlap:
            output_s = max(output_s, self.scheduled_s + time.floor_s)
        start_s = max(self.end_s, self.scheduled_s)
        hidden_s = min(time.launch_s, start_s - self.scheduled_s)
        onboard_s = self.kv.take_onboarded() * self.limits.onboard_block_s
        end_s = start_s + time.seconds - hidden_s + onboard_s
        scheduled_s = output_s if self.overlap else end_s
        return StepTiming(output_s, start_s, end_s, scheduled_s, end_s - start_s, 0.0)

    def take_mixed_step(self, chunks: Chunks, step: MixedStep, timing: StepTiming) -> None:
        """Take one step that prefills, beside whatever decodes."""
        self._record(timing, 1, step.prompts, step.tokens)
        self._grow(1)
        self._pass(timing)
        self._prefill(chunks, timing.start_s)
        self._end_step()

    def _prefill(self, chunks: Chunks, start_s: float) -> None:
        """Move prompts on by their chunks; those that are done make a token in this step."""
        done = False
        for request, chunk in chunks:
            if request.prefilled == request.cached_tokens and not request.generated:
                self.results.start(request.index, start_s, request.cached_tokens)
            request.prefilled += chunk
            if request.prefilled >= request.prefill_len:
                done = True
                self._make_first_token(request)
        if done:
            self._prefilling = [r for r in self._prefilling if r.prefilled < r.prefill_len]

    def _make_first_token(self, request: Request) -> None:
        """The prompt is computed and its next token made; from the next step on it decodes."""
        self.kv.prefilled(request)
        self.unsent_first.append(request)
        step = self._steps_taken
        left = request.osl - request.generated - 1
        request.context_offset = request.prefill_len - step
        if left == 0:
            self.unsent_last.append(request)
            self._leave(request)
            return
        request.finish_step = step + left
        heappush(self._finishing, (request.finish_step, request.order, request))
        self.decoding += 1
        self._context_tokens += request.prefill_len + 1
        self.kv.start_decoding(request)

    def decode_span(self, *, added_s: float = 0.0) -> DecodeSpan:
        """Return the steps in which the present batch decodes."""
        kv_len = self._context_tokens / self.decoding
        return self.clock.decode_span(self.decoding, kv_len, added_s=added_s)

    def decode_timing(self, span: DecodeSpan, steps: int) -> StepTiming:
        """Return when the next steps run if they only decode."""
        start_s = max(self.end_s, self.scheduled_s)
        took_s = first_s = span.seconds(steps)
        until_last_s = 0.0
        if steps > 1:
            first_s, until_last_s = span.seconds(1), span.seconds(steps - 1)
        end_s = start_s + took_s
        scheduled_s = start_s + until_last_s if self.overlap else end_s
        return StepTiming(self.end_s, start_s, end_s, scheduled_s, first_s, until_last_s)

    def take_decode_steps(self, steps: int, timing: StepTiming, at_once: float = 1.0) -> None:
        """Take decode steps, no more than nothing interrupts.

        Args:
            steps: How many.
            timing: When they run.
            at_once: Steps whose tokens a client gets at once, on average.
        """
        self._record(timing, steps, at_once=at_once)
        self._grow(steps)
        self._pass(timing)
        self._end_step()

    def take_no_step(self, steps: int, timing: StepTiming) -> None:
        """Sit idle while engines in step with this one take theirs."""
        self._steps_taken += steps
        self._pass(timing)

    def _pass(self, timing: StepTiming) -> None:
        """Move the clock to the end of the steps just taken."""
        self.scheduled_s = timing.scheduled_s
        self.end_s = timing.end_s

    def uninterrupted_steps(self, span: DecodeSpan, event_s: float) -> int:
        """Return the steps of such lengths until something else can happen, at least one.

        Args:
            span: The steps.
            event_s: When a client or the front end next does something.
        """
        steps = self._finish_in() if self.decoding else MOST_STEPS
        # What leaves makes room for whoever waits, and for prefixes that would be evicted.
        if self._leaving and (self.waiting.count or self.kv.cache is not None):
            steps = min(steps, self._leaving[0][0] - self._steps_taken)
        if not self._reserves:
            room = self.kv.room(reserving=False)
            steps = self.kv.pool.steps_within(self._steps_taken, room, steps)
        if event_s < math.inf and steps > 1:
            wait = span.steps_until(event_s - max(self.end_s, self.scheduled_s), steps)
            steps = min(steps, wait + self._lag)
        return max(steps, 1)

    def _finish_in(self) -> int:
        """Return the steps until the first sequence ends, that step included."""
        finishing = self._finishing
        while finishing[0][0] != finishing[0][2].finish_step:
            heappop(finishing)
        return finishing[0][0] - self._steps_taken

    def _grow(self, steps: int) -> None:
        """All decoding sequences gain a token a step."""
        if self.decoding:
            self.kv.grow(self._steps_taken, steps)
            self._context_tokens += steps * self.decoding
        self._steps_taken += steps

    def _end_step(self) -> None:
        """Take out the sequences that made their last token in the step just taken."""
        self.unsent_tokens = self.decoding + len(self.unsent_first)
        finishing = self._finishing
        while finishing and finishing[0][0] <= self._steps_taken:
            step, _, request = heappop(finishing)
            if step == request.finish_step:
                self._stop_decoding(request)
                self.unsent_last.append(request)
                self._leave(request)

    def _stop_decoding(self, request: Request) -> None:
        """Take a sequence out of the batch that decodes."""
        self.decoding -= 1
        self._context_tokens -= request.context_offset + self._steps_taken + 1
        self.kv.stop_decoding(request, self._steps_taken)
        request.finish_step = -1

    def _leave(self, request: Request) -> None:
        del self._started[request]
        self._leaving.append((self._steps_taken + self._lag, request))

    # Time and output

    def come_to_rest(self) -> bool:
        """Free what is left of the last step; return whether anybody waits."""
        while self._leaving:
            self.kv.release(self._leaving.popleft()[1])
        self.scheduled_s = max(self.scheduled_s, self.end_s)
        return self.waiting.count > 0

    def wait_until(self, event_s: float) -> None:
        """Sit idle until something happens; for ever if nothing does."""
        self.scheduled_s = self.end_s = max(self.scheduled_s, event_s)

    def sent(self, output_s: float, streamed_s: float) -> None:
        """Learn when the tokens of the last step planned left the engine and the front end."""
        self.unsent_tokens = 0
        self.steps.output_delay_s = max(output_s - self.end_s, 0.0)
        self.steps.stream_delay_s = streamed_s - output_s

    def _record(
        self,
        timing: StepTiming,
        steps: int,
        prompts: int = 0,
        prompt_tokens: int = 0,
        at_once: float = 1.0,
    ) -> None:
        """Log steps, with the prompts and prompt tokens of one."""
        start_s, end_s, kv = timing.start_s, timing.end_s, self.kv
        self.steps.add(
            start_s, end_s,
            steps, self.decoding, self._context_tokens, prompts, prompt_tokens, self.waiting.count,
            timing.first_s, end_s - start_s - timing.until_last_s, at_once,
            kv.occupied, kv.pool.reserved,
        )  # fmt: skip
