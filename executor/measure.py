"""Measures one configuration under one workload: start, warm up, repeat, store, end.

Whatever happens, the run that it happened to is stored with its status, nothing of the server is
left, and the GPU's memory is seen to be free again.
"""

from __future__ import annotations

import hashlib
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from executor.backend import (
    Backend,
    BenchmarkBackend,
    Deployment,
    Failure,
    Server,
    ServerFailedError,
    ServingBackend,
    check_can_run,
)
from executor.drive import (
    TICK_INTERVAL_S,
    Driven,
    drive,
    failure_message,
    interrupts_as_errors,
    verdict,
)
from executor.load_generator import LoadView, Prompt, TimeLimits
from executor.machine import (
    GpuReader,
    Telemetry,
    is_shared,
    machine_section,
    memory_used_bytes,
    wait_until_free,
)
from executor.observe import Observe, Observer
from executor.protocols import ClosedLoop
from executor.records import MeasuredRequest, RunRecord, measured_section
from executor.repeats import RepeatRule
from executor.store import RunStore, resume_key
from executor.traffic import Traffic, Warmth, random_prompts, warm_up_rounds, warmth_for
from executor.window import longest_stall_s, steady_section

Progress = Callable[[str, float], None]
"""Told what begins now, and how many seconds are left of the time budget."""

LEAST_PHASE_S = 1.0

CACHED_FRACTION = 0.02
"""Share of the prompt tokens that may come from a prefix cache by chance and block rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseLimits:
    """How long each phase may take; seconds."""

    prepare_s: float = 3600.0
    start_s: float = 900.0
    warm_up_s: float = 300.0
    run_s: float = 1800.0
    request_s: float = 600.0
    silence_s: float = 120.0
    free_memory_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How to measure."""

    limits: PhaseLimits = field(default_factory=PhaseLimits)
    rule: RepeatRule = field(default_factory=RepeatRule)
    time_budget_s: float = 600.0
    """For one case; the repeats end when it is spent."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration under one workload."""

    deployment: Deployment
    traffic: Traffic
    gpu: str
    """Profile name, as runs give it."""
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def key(self, backend: Backend) -> str:
        """Return what finds the runs of the same question again."""
        deployment, traffic = self.deployment, self.traffic
        return resume_key(
            {"backend": backend.name, "version": backend.availability().version},
            {"gpu": self.gpu, "model": deployment.model.name},
            {"random_weights": deployment.model.has_random_weights},
            asdict(deployment.config),
            dict(deployment.options),
            dict(traffic.workload),
            {"isl": list(traffic.isl), "osl": list(traffic.osl)},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The runs of one case, those of earlier campaigns first."""

    key: str
    records: tuple[Mapping[str, Any], ...]
    """Lines of a runs file, good ones and failures."""
    num_resumed: int = 0
    """Runs that had been stored before."""

    @property
    def measured(self) -> list[Mapping[str, Any]]:
        """The `measured` sections of the runs that ended well."""
        return [record["measured"] for record in self.records if record["status"] == "ok"]

    @property
    def is_ok(self) -> bool:
        """Whether anything was measured and nothing failed."""
        return bool(self.records) and all(record["status"] == "ok" for record in self.records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a measurement works with."""

    backend: Backend
    store: RunStore
    reader: GpuReader
    options: MeasureOptions = field(default_factory=MeasureOptions)
    progress: Progress = lambda _what, _left_s: None
    observe: Observe | None = None
    """Told twice a second what can be seen; from a thread beside the measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one run ended, and what it measured."""

    status: str = "ok"
    error: str = ""
    requests: tuple[MeasuredRequest, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    notes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def measure(case: Case, tools: Tools) -> Measurement:
    """Measure a case until its repeats agree or its time is spent, and store every run.

    Runs of the same case that are in the store count as repeats. A failure is a stored run.

    Raises:
        MeasurementError: The store does not take a run.
        KeyboardInterrupt: Interrupted; what was measured is stored, the server has ended.
    """
    return measure_together([case], tools)[0]


def measure_together(cases: Sequence[Case], tools: Tools) -> list[Measurement]:
    """Measure cases of one deployment, one after the other, behind one start of its server.

    The time budget is theirs together. A server that dies fails the case at hand and those that
    were still to come; the same call goes on with these.

    Raises:
        MeasurementError: The store does not take a run.
        KeyboardInterrupt: Interrupted; what was measured is stored, the server has ended.
    """
    _allow_many_connections()
    stay = _Stay(cases, tools)
    if stay.waiting:
        stay.run()
    return [session.measurement for session in stay.sessions]


def _allow_many_connections() -> None:
    """Take as many open files as the system gives: a burst has a connection for each request."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Stay:
    """One start of a backend, and the cases that are measured meanwhile."""

    def __init__(self, cases: Sequence[Case], tools: Tools) -> None:
        self.tools = tools
        self.deployment = cases[0].deployment
        self.until_s = time.monotonic() + tools.options.time_budget_s
        self.memory_before = memory_used_bytes(tools.reader)
        self.observer = Observer(tools.observe, tools.reader)
        self.sessions = [_Session(case, self) for case in cases]
        self.waiting = [session for session in self.sessions if not session.is_complete]
        """Not complete; the first is the one at hand."""
        self.warmth = Warmth()

    @property
    def left_s(self) -> float:
        """What is left of the time budget."""
        return self.until_s - time.monotonic()

    def run(self) -> None:
        """Bring the backend up, measure, and turn every failure into stored runs."""
        try:
            with interrupts_as_errors(), self.observer:
                self._measure()
        except ServerFailedError as error:
            for session in self.waiting:
                session.keep(_failed(error))
        except KeyboardInterrupt:
            session = self.waiting[0] if self.waiting else self.sessions[-1]
            if all(record["status"] != Failure.INTERRUPTED for record in session.records):
                session.keep(Outcome(status=Failure.INTERRUPTED, error="interrupted"))
            raise

    def _measure(self) -> None:
        backend, limits = self.tools.backend, self.tools.options.limits
        check_can_run(backend, self.deployment)
        with self._saying("prepare"):
            limit_s = self.within(limits.prepare_s)
            deployment = backend.prepare(self.deployment, limit_s=limit_s)
        if isinstance(backend, BenchmarkBackend):
            self._each(lambda session: session.benchmark_all(backend, deployment))
        elif isinstance(backend, ServingBackend):
            with self._serving(backend, deployment) as server:
                self._each(lambda session: session.load_all(server))

    def _each(self, measure_one: Callable[[_Session], None]) -> None:
        """Measure the cases in turn, each in its share of the time that is left."""
        while self.waiting and self.left_s > 0:
            session = self.waiting[0]
            session.until_s = time.monotonic() + self.left_s / len(self.waiting)
            measure_one(session)
            del self.waiting[0]

    @contextmanager
    def _serving(self, backend: ServingBackend, deployment: Deployment) -> Iterator[Server]:
        limits, server = self.tools.options.limits, None
        try:
            with self._saying("start"):
                server = backend.start(deployment, limit_s=self.within(limits.start_s))
            yield server
        finally:
            if server is not None:
                self.say("stop")
                server.stop()
            self.check_memory_is_free()

    def check_memory_is_free(self) -> None:
        """Store a failure where memory stays in use: later runs must not be trusted."""
        limit_s = self.tools.options.limits.free_memory_s
        if not self.tools.backend.uses_gpu:
            return
        if not wait_until_free(self.tools.reader, self.memory_before, limit_s=limit_s):
            used = memory_used_bytes(self.tools.reader)
            self.sessions[-1].keep(
                Outcome(
                    status=Failure.NOT_ENDED,
                    error=f"GPU memory in use {limit_s:g} s after the end: {used} bytes, "
                    f"{self.memory_before} before the start",
                )
            )

    def within(self, limit_s: float) -> float:
        """Return a phase's limit, or what is left of the time budget where that is less."""
        return max(min(limit_s, self.left_s), LEAST_PHASE_S)

    def say(self, what: str) -> None:
        """Tell who watches what is done now."""
        left_s = max(self.left_s, 0.0)
        self.observer.enter_phase(what, left_s)
        self.tools.progress(what, left_s)

    @contextmanager
    def _saying(self, what: str) -> Iterator[None]:
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


class _Session:
    """The state of one case, owned by its stay."""

    def __init__(self, case: Case, stay: _Stay) -> None:
        self.case = case
        self.stay = stay
        self.tools = tools = stay.tools
        self.key = case.key(tools.backend)
        self.records: list[Mapping[str, Any]] = [
            run.record for run in tools.store.finished(self.key)
        ]
        self.num_resumed = len(self.records)
        deployment = case.deployment
        self.stem = f"{case.gpu}_{tools.backend.name}_{deployment.model.label}_{self.key[:10]}"
        # Asked for once: a store that is locked later must not keep a run from its id.
        self.num_stored = tools.store.count(self.stem)
        self.until_s = stay.until_s

    @property
    def measurement(self) -> Measurement:
        """What there is by now."""
        return Measurement(key=self.key, records=tuple(self.records), num_resumed=self.num_resumed)

    @property
    def is_complete(self) -> bool:
        """Whether the repeats will do."""
        return self.tools.options.rule.is_enough(self.measurement.measured)

    @property
    def left_s(self) -> float:
        """What is left of this case's share of the time budget."""
        return self.until_s - time.monotonic()

    def load_all(self, server: Server) -> None:
        """Warm a server up for this case and send its traffic until the repeats agree."""
        self._say("warm up")
        with self._seen(server) as view:
            self._warm_up(server, view)
        self._repeat(lambda number: self._load(server, number))

    def benchmark_all(self, backend: BenchmarkBackend, deployment: Deployment) -> None:
        """Let the engine's own program measure until the repeats agree."""
        self._repeat(lambda number: self._benchmark(backend, deployment, number))

    def _warm_up(self, server: Server, view: LoadView) -> None:
        """Send what makes the engine compile, capture and tune all that the runs will need.

        Raises:
            ServerFailedError: The server fails under it.
        """
        config, options = self.case.deployment.config, self.tools.options
        until_s = time.monotonic() + self._within(options.limits.warm_up_s)
        needed = warmth_for(self.case.traffic, max_batch_size=config.max_batch_size)
        rounds = warm_up_rounds(self.case.traffic, needed, self.stay.warmth)
        for number, part in enumerate(rounds):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
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
                limits=_time_limits(options.limits, left_s),
                view=view,
            )
            _raise_if_broken(driven, server)
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
            if outcome.status != "ok" or self.is_complete or self.left_s <= took_s:
                return

    def _load(self, server: Server, number: int) -> Outcome:
        """Send the whole traffic once."""
        case, options = self.case, self.tools.options
        prompts = self._prompts(number)
        limits = _time_limits(options.limits, self._within(options.limits.run_s))
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
        return _outcome(
            driven,
            server,
            counted=counted,
            telemetry=telemetry.summary(),
            was_cached=_was_cached(counted, case.traffic),
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

    def _benchmark(self, backend: BenchmarkBackend, deployment: Deployment, number: int) -> Outcome:
        """Let the engine's own program measure the traffic once."""
        prompts = self._prompts(number)
        with Telemetry(self.tools.reader) as telemetry:
            result = backend.benchmark(
                deployment,
                prompts,
                protocol=self.case.traffic.protocol,
                limit_s=self._within(self.tools.options.limits.run_s),
            )
        self.stay.check_memory_is_free()
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

    def _within(self, limit_s: float) -> float:
        """Return a phase's limit, or what is left of the time budget where that is less."""
        return max(min(limit_s, self.left_s), LEAST_PHASE_S)

    def _say(self, what: str) -> None:
        if len(self.stay.sessions) > 1:
            what = f"case {self.stay.sessions.index(self) + 1}, {what}"
        self.stay.say(what)

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


def _raise_if_broken(driven: Driven, server: Server) -> None:
    """Raise what a warm-up met: all but its own time limit, and single wrong requests."""
    if driven.interrupted:
        raise KeyboardInterrupt
    status, error = verdict(driven, server)
    if status not in ("ok", Failure.OUT_OF_TIME, Failure.WRONG_LENGTH):
        raise ServerFailedError(f"warm-up: {error}", kind=Failure(status))


def _outcome(
    driven: Driven,
    server: Server,
    *,
    counted: Mapping[str, float],
    telemetry: Mapping[str, Any],
    was_cached: bool,
) -> Outcome:
    result = driven.result
    status, error = verdict(driven, server)
    stall_s = longest_stall_s(result.requests)
    measured = {
        **measured_section(result.requests),
        **server.facts(),
        **counted,
        "steady": steady_section(result.requests),
        "longest_stall_ms": round(stall_s * 1e3, 1),
    }
    reasons = {
        "client_limited": result.lag.limits_the_run,
        "stalled": stall_s > 0,
        "cached_prompts": was_cached,
        "approximate_lengths": not server.endpoint.exact_lengths,
    }
    return Outcome(
        status=status,
        error=error,
        requests=result.requests,
        measured=measured,
        client=result.lag.to_json(),
        telemetry=telemetry,
        command=server.command,
        notes=server.notes,
        flags=tuple(name for name, holds in reasons.items() if holds),
    )


def _was_cached(counted: Mapping[str, float], traffic: Traffic) -> bool:
    """Whether the engine had prompts in its cache beyond the prefix that they share."""
    found = counted.get("num_prefix_cache_hit_tokens", 0.0)
    shared = traffic.shared_prefix_tokens * len(traffic.isl)
    return found - shared > CACHED_FRACTION * sum(traffic.isl)


def _failed(error: ServerFailedError) -> Outcome:
    return Outcome(status=error.kind, error=failure_message(error), command=error.command)


def _time_limits(limits: PhaseLimits, run_s: float) -> TimeLimits:
    return TimeLimits(run_s=run_s, silence_s=limits.silence_s, request_s=limits.request_s)
