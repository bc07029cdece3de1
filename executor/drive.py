"""Sends one load to a server, watches both, and says how it went."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from executor.backend import Failure, Server, ServerFailedError
from executor.load_generator import LoadResult, LoadView, Prompt, TimeLimits, run_load
from executor.process import OUT_OF_MEMORY
from executor.protocols import LoadProtocol
from executor.records import RequestStatus

WATCH_INTERVAL_S = 0.2
"""How often a server is looked at while requests are in flight."""

TICK_INTERVAL_S = 5.0
"""How often somebody who waits is told that it goes on."""

END_NOTICE_S = 3.0
"""How long after a lost connection the server's own end may become visible."""

REQUEST_FAILURES: Mapping[RequestStatus, Failure] = {
    RequestStatus.TIMED_OUT: Failure.HUNG,
    RequestStatus.LOST: Failure.LOST_CONNECTION,
    RequestStatus.REFUSED: Failure.REFUSED,
    RequestStatus.WRONG_LENGTH: Failure.WRONG_LENGTH,
}
"""What a run is called by the worst of its requests, the worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driven:
    """A load that was sent, and whether somebody broke it off."""

    result: LoadResult
    interrupted: bool


def drive(
    server: Server,
    prompts: Sequence[Prompt],
    *,
    protocol: LoadProtocol,
    limits: TimeLimits,
    tick: Callable[[], None] = lambda: None,
    view: LoadView | None = None,
) -> Driven:
    """Send a load; the server's end and an interrupt end it early, with what is there.

    Args:
        server: Runs, and is watched.
        prompts: What is sent.
        protocol: When it is sent.
        limits: How long it may take.
        tick: Called every few seconds while it goes on.
        view: Lets another thread see the requests while they run.

    Raises:
        ServerFailedError: The server takes no connection.
    """
    try:
        work = _driven(server, prompts, protocol=protocol, limits=limits, tick=tick, view=view)
        return asyncio.run(work)
    except OSError as error:
        failure = _wait_for_failure(server)
        raise failure or ServerFailedError(
            f"no connection: {error}", kind=Failure.LOST_CONNECTION, log_tail=server.log_tail()
        ) from error


async def _driven(
    server: Server,
    prompts: Sequence[Prompt],
    *,
    protocol: LoadProtocol,
    limits: TimeLimits,
    tick: Callable[[], None],
    view: LoadView | None,
) -> Driven:
    stop, interrupts = asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        interrupts.set()
        stop.set()

    async def watch() -> None:
        next_tick_s = time.monotonic() + TICK_INTERVAL_S
        while server.failure() is None:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if time.monotonic() >= next_tick_s:
                next_tick_s += TICK_INTERVAL_S
                tick()
        stop.set()

    watching = asyncio.create_task(watch())
    with _on_interrupt(interrupt):
        try:
            result = await run_load(
                server.endpoint, prompts, protocol=protocol, limits=limits, stop=stop, view=view
            )
        finally:
            watching.cancel()
    return Driven(result=result, interrupted=interrupts.is_set())


@contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Call a function on SIGINT and SIGTERM while the event loop runs (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextmanager
def interrupts_as_errors() -> Iterator[None]:
    """Let SIGTERM raise what SIGINT raises, so that both end a run in the same way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def verdict(driven: Driven, server: Server) -> tuple[str, str]:
    """Return status and error of a load."""
    if driven.interrupted:
        return Failure.INTERRUPTED, "interrupted"
    found = {request.status for request in driven.result.requests}
    if RequestStatus.LOST in found or driven.result.was_stopped:
        failure = _wait_for_failure(server)
        if failure is not None:
            return failure.kind, failure_message(failure)
    for status, failure_kind in REQUEST_FAILURES.items():
        if status in found:
            return _request_failure(driven.result, server, status, failure_kind)
    if driven.result.out_of_time:
        return Failure.OUT_OF_TIME, f"not all was answered within {driven.result.wall_s:.0f} s"
    return "ok", ""


def _request_failure(
    result: LoadResult, server: Server, status: RequestStatus, kind: Failure
) -> tuple[str, str]:
    failed = [request for request in result.requests if request.status is status]
    log = server.log_tail()
    if OUT_OF_MEMORY.search(log) and kind is not Failure.WRONG_LENGTH:
        kind = Failure.OUT_OF_MEMORY
    message = f"{len(failed)} of {len(result.requests)} requests {status}: {failed[0].error}"
    return kind, f"{message}\n{log}".strip()


def _wait_for_failure(server: Server) -> ServerFailedError | None:
    """Return why the server ended; its end is seen a moment after its connections broke."""
    until_s = time.monotonic() + END_NOTICE_S
    while time.monotonic() < until_s:
        failure = server.failure()
        if failure is not None:
            return failure
        time.sleep(WATCH_INTERVAL_S)
    return None


def failure_message(error: ServerFailedError) -> str:
    """Return the failure with the end of the log, as a run keeps it."""
    return f"{error}\n{error.log_tail}".strip()
