"""One case under measurement: warm-up, repeats, and a stored run for each."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from executor.backend import BenchmarkBackend, Failure, Launch, Server
from executor.case import Case, Measurement, Tools
from executor.deadline import Deadline
from executor.drive import TICK_INTERVAL_S, drive
from executor.load_generator import LoadView, Prompt
from executor.machine import (
    Telemetry,
    is_shared,
    machine_section,
    memory_used_bytes,
    wait_until_free,
)
from executor.observe import Observer
from executor.outcome import Outcome, outcome_of, raise_if_broken, was_cached
from executor.protocols import ClosedLoop
from executor.records import RunRecord, measured_section
from executor.traffic import Warmth, random_prompts, warm_up_rounds, warmth_for


@dataclass(slots=True, kw_only=True)
class ServerLease:
    """What the cases behind one start of a backend have in common."""

    tools: Tools
    deadline: Deadline
    """Of the time budget, which is theirs together."""
    memory_before: Sequence[float]
    """In use on each GPU before the start; bytes."""
    observer: Observer
    warmth: Warmth = field(default_factory=Warmth)
    """What the engine has seen so far."""

    def say(self, what: str) -> None:
        """Tell who watches what is done now."""
        left_s = max(self.deadline.left_s, 0.0)
        self.observer.enter_phase(what, left_s)
        self.tools.progress(what, left_s)

    @contextmanager
    def saying(self, what: str) -> Iterator[None]:
        """Say what begins, and every few seconds that it goes on: an engine starts for minutes."""
        self.say(what)
        done = threading.Event()

        def tick() -> None:
            while not done.wait(TICK_INTERVAL_S):
                self.say(f"{what} goes on")

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()

    def memory_failure(self) -> Outcome | None:
        """Return a failure where memory stays in use: later runs must not be trusted."""
        limit_s = self.tools.options.limits.free_memory_s
        if not self.tools.backend.uses_gpu:
            return None
        if wait_until_free(self.tools.reader, self.memory_before, limit_s=limit_s):
            return None
        used = memory_used_bytes(self.tools.reader)
        return Outcome(
            status=Failure.NOT_ENDED,
            error=f"GPU memory in use {limit_s:g} s after the end: {used} bytes, "
            f"{self.memory_before} before the start",
        )


class Session:
    """One case: its runs so far, and how the next is made.

    Args:
        case: What is measured.
        stay: What it shares with the other cases behind one start.
        name: Before what is said of it, where there are others; empty for one alone.
    """

    def __init__(self, case: Case, stay: ServerLease, *, name: str = "") -> None:
        self.case = case
        self.stay = stay
        self.tools = tools = stay.tools
        self.name = name
        self.key = case.key(tools.backend)
        self.records: list[Mapping[str, Any]] = [
            run.record for run in tools.store.finished(self.key)
        ]
        self.num_resumed = len(self.records)
        deployment = case.deployment
        self.stem = (
            f"{Path(case.gpu).stem}_{tools.backend.name}_{deployment.model.label}_{self.key[:10]}"
        )
        # Asked for once: a store that is locked later must not keep a run from its id.
        self.num_stored = tools.store.count(self.stem)
        self.deadline = stay.deadline
        """Of this case's share of the time budget."""

    @property
    def measurement(self) -> Measurement:
        """What there is by now."""
        return Measurement(key=self.key, records=tuple(self.records), num_resumed=self.num_resumed)

    @property
    def is_complete(self) -> bool:
        """Whether the repeats will do."""
        return self.tools.options.rule.is_enough(self.measurement.measured)

    def load_all(self, server: Server) -> None:
        """Warm a server up for this case and send its traffic until the repeats agree."""
        self._say("warm up")
        with self._seen(server) as view:
            self._warm_up(server, view)
        self._repeat(lambda number: self._load(server, number))

    def benchmark_all(self, backend: BenchmarkBackend, deployment: Launch) -> None:
        """Let the engine's own program measure until the repeats agree."""
        self._repeat(lambda number: self._benchmark(backend, deployment, number))

    def _warm_up(self, server: Server, view: LoadView) -> None:
        """Send what makes the engine compile, capture and tune all that the runs will need.

        Raises:
            ServerFailedError: The server fails under it.
        """
        config, options = self.case.deployment.config, self.tools.options
        limit = Deadline.after(self.deadline.within(options.limits.warm_up_s))
        needed = warmth_for(self.case.traffic, max_batch_size=config.max_batch_size)
        rounds = warm_up_rounds(self.case.traffic, needed, self.stay.warmth)
        for number, part in enumerate(rounds):
            if limit.left_s <= 0:
                return
            prompts = random_prompts(
                part.isl,
                part.osl,
                vocab_size=self.case.deployment.model.vocab_size,
                seed=_seed(self.key, options.seed, f"warm-up {number}"),
            )
            driven = drive(
                server,
                prompts,
                protocol=ClosedLoop(concurrency=part.concurrency),
                limits=options.limits.of_load(limit.left_s),
                view=view,
            )
            raise_if_broken(driven, server)
        self.stay.warmth = needed.and_more(self.stay.warmth)

    def _repeat(self, run_once: Callable[[int], Outcome]) -> None:
        """Run until the rule is content, the time is spent, or a run fails."""
        while True:
            number = len(self.measurement.measured)
            self._say(f"run {number + 1}")
            start_s = time.monotonic()
            outcome = run_once(number)
            took_s = time.monotonic() - start_s
            self.keep(outcome)
            if outcome.status == Failure.INTERRUPTED:
                raise KeyboardInterrupt
            # A run that would be cut off by the end of the budget is not begun.
            if outcome.status != "ok" or self.is_complete or self.deadline.left_s <= took_s:
                return

    def _load(self, server: Server, number: int) -> Outcome:
        """Send the whole traffic once."""
        case, options = self.case, self.tools.options
        prompts = self._prompts(number)
        limits = options.limits.of_load(self.deadline.within(options.limits.run_s))
        before = server.counters()
        with Telemetry(self.tools.reader) as telemetry, self._seen(server) as view:
            driven = drive(
                server,
                prompts,
                protocol=case.traffic.protocol,
                limits=limits,
                tick=lambda: self._say(f"run {number + 1} goes on"),
                view=view,
            )
        counted = {k: v - before.get(k, 0.0) for k, v in server.counters().items()}
        return outcome_of(
            driven,
            server,
            counted=counted,
            telemetry=telemetry.summary(),
            cached=was_cached(counted, case.traffic),
        )

    @contextmanager
    def _seen(self, server: Server) -> Iterator[LoadView]:
        """Let the observer see the load that is sent meanwhile."""
        view = LoadView()
        self.stay.observer.watch_load(view, server)
        try:
            yield view
        finally:
            self.stay.observer.watch_load(None, None)

    def _benchmark(self, backend: BenchmarkBackend, deployment: Launch, number: int) -> Outcome:
        """Let the engine's own program measure the traffic once."""
        prompts = self._prompts(number)
        with Telemetry(self.tools.reader) as telemetry:
            result = backend.benchmark(
                deployment,
                prompts,
                protocol=self.case.traffic.protocol,
                limit_s=self.deadline.within(self.tools.options.limits.run_s),
            )
        stays = self.stay.memory_failure()
        if stays is not None:
            self.keep(stays)
        measured = measured_section(result.requests) if result.requests else {}
        return Outcome(
            requests=result.requests,
            measured={**measured, **result.measured},
            telemetry=telemetry.summary(),
            command=result.command,
            notes=result.notes,
        )

    def _prompts(self, number: int) -> list[Prompt]:
        """Return a run's prompts: no two cases share any, or a prefix cache would answer."""
        seed = _seed(self.key, self.tools.options.seed, f"run {number}")
        vocab_size = self.case.deployment.model.vocab_size
        return self.case.traffic.prompts(vocab_size=vocab_size, seed=seed)

    def _say(self, what: str) -> None:
        self.stay.say(f"{self.name}{what}")

    def keep(self, outcome: Outcome) -> None:
        """Store a run in the moment that it ends."""
        record = self._record(outcome)
        self.num_stored += 1
        stored = self.tools.store.save(record, outcome.requests, key=self.key)
        self.records.append(stored.to_json())

    def _record(self, outcome: Outcome) -> RunRecord:
        case, backend = self.case, self.tools.backend
        deployment = case.deployment
        versions = backend.versions()
        machine = machine_section(self.tools.reader, versions=versions, command=outcome.command)
        return RunRecord(
            run_id=f"{self.stem}-{self.num_stored + 1}",
            source=f"measured {time.strftime('%Y-%m-%d')} by `planner measure`",
            gpu=case.gpu,
            num_gpus=deployment.config.num_gpus,
            engine=backend.engine_of(deployment),
            engine_version=backend.availability().version or None,
            model=deployment.model.name,
            config=asdict(deployment.config),
            workload=dict(case.traffic.workload),
            measured=outcome.measured,
            client=outcome.client,
            machine={**machine, **outcome.telemetry},
            predicted=case.predicted,
            flags=(*outcome.flags, *self._machine_flags(outcome)),
            status=outcome.status,
            error=outcome.error,
            notes="; ".join((*self._weights_note(), *outcome.notes)) or None,
        )

    def _machine_flags(self, outcome: Outcome) -> Iterator[str]:
        if outcome.telemetry.get("throttled"):
            yield "throttled"
        if self.tools.backend.uses_gpu and is_shared(self.stay.memory_before):
            yield "shared_gpu"

    def _weights_note(self) -> Iterator[str]:
        if self.case.deployment.model.has_random_weights:
            yield "random weights"


def _seed(*parts: object) -> int:
    """Return a seed of its own for each case, run and warm-up."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
