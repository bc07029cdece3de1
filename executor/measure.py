"""Measures configurations under workloads: start, warm up, repeat, store, end.

Whatever happens, the run that it happened to is stored with its status, nothing of the server is
left, and the GPU's memory is seen to be free again.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from executor.backend import (
    BenchmarkBackend,
    Failure,
    Launch,
    Server,
    ServerFailedError,
    ServingBackend,
    check_can_run,
)
from executor.case import Case, Measurement, Tools
from executor.deadline import Deadline
from executor.drive import interrupts_as_errors
from executor.machine import memory_used_bytes
from executor.observe import Observer
from executor.outcome import Outcome, failed
from executor.session import ServerLease, Session


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
    campaign = _Campaign(cases, tools)
    if campaign.waiting:
        campaign.run()
    return [session.measurement for session in campaign.sessions]


def _allow_many_connections() -> None:
    """Take as many open files as the system gives: a burst has a connection for each request."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Campaign:
    """One start of a backend, and the cases that are measured meanwhile."""

    def __init__(self, cases: Sequence[Case], tools: Tools) -> None:
        self.tools = tools
        self.deployment = cases[0].deployment
        self.stay = ServerLease(
            tools=tools,
            deadline=Deadline.after(tools.options.time_budget_s),
            memory_before=memory_used_bytes(tools.reader),
            observer=Observer(tools.observe, tools.reader),
        )
        self.sessions = [
            Session(case, self.stay, name=f"case {number}, " if len(cases) > 1 else "")
            for number, case in enumerate(cases, 1)
        ]
        self.waiting = [session for session in self.sessions if not session.is_complete]
        """Not complete; the first is the one at hand."""

    def run(self) -> None:
        """Bring the backend up, measure, and turn every failure into stored runs."""
        try:
            with interrupts_as_errors(), self.stay.observer:
                self._measure()
        except ServerFailedError as error:
            for session in self.waiting:
                session.keep(failed(error))
        except KeyboardInterrupt:
            session = self.waiting[0] if self.waiting else self.sessions[-1]
            if all(record["status"] != Failure.INTERRUPTED for record in session.records):
                session.keep(Outcome(status=Failure.INTERRUPTED, error="interrupted"))
            raise

    def _measure(self) -> None:
        backend, limits = self.tools.backend, self.tools.options.limits
        check_can_run(backend, self.deployment)
        with self.stay.saying("prepare"):
            limit_s = self.stay.deadline.within(limits.prepare_s)
            deployment = backend.prepare(self.deployment, limit_s=limit_s)
        if isinstance(backend, BenchmarkBackend):
            self._each(lambda session: session.benchmark_all(backend, deployment))
        elif isinstance(backend, ServingBackend):
            with self._serving(backend, deployment) as server:
                self._each(lambda session: session.load_all(server))

    def _each(self, measure_one: Callable[[Session], None]) -> None:
        """Measure the cases in turn, each in its share of the time that is left."""
        while self.waiting and self.stay.deadline.left_s > 0:
            session = self.waiting[0]
            session.deadline = Deadline.after(self.stay.deadline.left_s / len(self.waiting))
            measure_one(session)
            del self.waiting[0]

    @contextmanager
    def _serving(self, backend: ServingBackend, deployment: Launch) -> Iterator[Server]:
        limits, server = self.tools.options.limits, None
        try:
            with self.stay.saying("start"):
                limit_s = self.stay.deadline.within(limits.start_s)
                server = backend.start(deployment, limit_s=limit_s)
            yield server
        finally:
            if server is not None:
                self.stay.say("stop")
                server.stop()
            stays = self.stay.memory_failure()
            if stays is not None:
                self.sessions[-1].keep(stays)
