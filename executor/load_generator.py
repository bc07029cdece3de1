"""Sends a workload to an OpenAI-compatible server and stamps every token that comes back.

Everything a request needs is made before the run and every record after it; while it runs,
sockets are read (`http_stream`) and tokens counted (`token_stream`), nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cost_models.metrics import percentile
from executor.http_stream import (
    ConnectionLostError,
    ConnectionPool,
    ProtocolViolationError,
    Reply,
    StreamConnection,
)
from executor.protocols import LoadProtocol
from executor.records import MeasuredRequest, RequestStatus
from executor.token_stream import TokenStream

HTTP_OK = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to send requests, and what every request says."""

    port: int
    host: str = "127.0.0.1"
    tls: bool = False
    """Whether the server is asked over HTTPS; its certificate must be one that the host trusts."""
    path: str = "/v1/completions"
    model: str
    options: Mapping[str, Any] = field(
        default_factory=lambda: {
            "ignore_eos": True,
            # The only portable way to learn how many tokens a streamed chunk carries.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    )
    """Further keys of the request's JSON."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further lines of the request's head, as an authorization."""
    exact_lengths: bool = True
    """Whether another number of tokens than asked for is a failure."""

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    def http_request(self, prompt: Prompt) -> bytes:
        """Return the bytes to send for a prompt."""
        body = json.dumps(self.body(prompt)).encode()
        headers = {
            "Host": f"{self.host}:{self.port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.path} HTTP/1.1\r\n{lines}\r\n".encode() + body

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the request's JSON."""
        return {
            "model": self.model,
            "prompt": list(prompt.token_ids),
            "max_tokens": prompt.osl,
            "stream": True,
            **self.options,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request: its tokens, and how many are wanted."""

    token_ids: Sequence[int]
    osl: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimits:
    """How long each phase may take; seconds. Nothing waits for ever."""

    connect_s: float = 10.0
    silence_s: float = 120.0
    """For the first token, and between any two reads after it."""
    request_s: float = 600.0
    run_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLag:
    """How far the load generator itself was behind; seconds."""

    LOOP_LAG_LIMIT_S = 0.010
    LATE_SEND_LIMIT_S = 0.010
    CPU_LIMIT_FRACTION = 0.9

    loop_lag_p99_s: float
    """How late the event loop ran a timer, sampled throughout the run."""
    loop_lag_max_s: float
    late_send_p99_s: float
    """How long after it was due a request was sent."""
    late_send_max_s: float
    cpu_fraction: float
    """Share of one core that the event loop's thread used."""

    @property
    def limits_the_run(self) -> bool:
        """Whether the client, not the server, may have set the measured times."""
        return (
            self.loop_lag_p99_s > self.LOOP_LAG_LIMIT_S
            or self.late_send_p99_s > self.LATE_SEND_LIMIT_S
            or self.cpu_fraction > self.CPU_LIMIT_FRACTION
        )

    def to_json(self) -> dict[str, Any]:
        """Return the lag as a run's `client` section; times in ms."""
        return {
            "limited": self.limits_the_run,
            "loop_lag_ms": {"p99": _ms(self.loop_lag_p99_s), "max": _ms(self.loop_lag_max_s)},
            "late_send_ms": {"p99": _ms(self.late_send_p99_s), "max": _ms(self.late_send_max_s)},
            "cpu_fraction": round(self.cpu_fraction, 3),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """Every request of a run, in the order given, and how well the client kept up."""

    requests: tuple[MeasuredRequest, ...]
    lag: ClientLag
    start_s: float
    """When the run began, on the clock of `time.perf_counter`."""
    wall_s: float
    out_of_time: bool
    """Whether the run's time limit ended it."""
    was_stopped: bool = False
    """Whether somebody ended it before all requests were answered."""

    @property
    def longest_silence_s(self) -> float:
        """Longest time without a send or a token: a stall of the whole server shows here."""
        times = [np.array([0.0])]
        times += [r.arrival_s + np.array([0.0, *r.chunk_s]) for r in self.requests]
        return float(np.diff(np.sort(np.concatenate(times))).max(initial=0.0))


async def run_load(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    *,
    protocol: LoadProtocol,
    limits: TimeLimits | None = None,
    stop: asyncio.Event | None = None,
    view: LoadView | None = None,
) -> LoadResult:
    """Send all prompts as the protocol says and return what was seen.

    A request that fails is a result with its status. Setting `stop` ends the run with what is
    there; cancelling drops all connections and returns nothing. A `view` lets another thread see
    the requests while they run.

    Raises:
        OSError: The server takes no connection at the start.
    """
    run = _Run(endpoint=endpoint, prompts=prompts, limits=limits or TimeLimits())
    if view is not None:
        run.view = view
    try:
        await run.pool.open_ahead(protocol.connections(len(prompts)))
        with _no_garbage_collection():
            return await run.measure(protocol, stop or asyncio.Event())
    finally:
        run.pool.close()


@dataclass(slots=True)
class Exchange:
    """One request on its way; what is in it when it ends, well or badly, is its result."""

    due_s: float
    stream: TokenStream = field(default_factory=TokenStream)
    reply: Reply | None = None
    status: RequestStatus = RequestStatus.OK
    error: str = ""
    has_ended: bool = False


@dataclass(slots=True)
class LoadView:
    """The requests of a running load, open to the eyes of another thread."""

    num_prompts: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    """In the order of sending; only ever grows."""
    start_s: float = 0.0
    """On the clock of `time.perf_counter`; 0 before the start."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start_s if self.start_s else 0.0


class _Run:
    """The state of one run, owned by `run_load`."""

    def __init__(
        self, *, endpoint: Endpoint, prompts: Sequence[Prompt], limits: TimeLimits
    ) -> None:
        self.pool = ConnectionPool(
            host=endpoint.host,
            port=endpoint.port,
            tls=endpoint.tls,
            connect_limit_s=limits.connect_s,
        )
        self.prompts = prompts
        self.exact_lengths = endpoint.exact_lengths
        self.limits = limits
        self.payloads = [endpoint.http_request(prompt) for prompt in prompts]
        self.exchanges: dict[int, Exchange] = {}
        self.active: set[StreamConnection] = set()
        self.view = LoadView()

    async def measure(self, protocol: LoadProtocol, stop: asyncio.Event) -> LoadResult:
        """Drive the whole run."""
        watch = _LoopWatch(self.active, self.limits.silence_s)
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        self.view.num_prompts, self.view.start_s = len(self.prompts), start_s
        watching = asyncio.create_task(watch.run())
        driving = asyncio.create_task(protocol.drive(len(self.prompts), self.send))
        try:
            is_complete = await _done_before(driving, stop, self.limits.run_s)
        finally:
            watching.cancel()
        end_s, end_cpu_s = time.perf_counter(), time.thread_time()
        requests = tuple(
            _measured(
                self.exchanges.get(index) or _unsent(end_s),
                prompt,
                start_s=start_s,
                exact_lengths=self.exact_lengths,
            )
            for index, prompt in enumerate(self.prompts)
        )
        cpu_fraction = (end_cpu_s - start_cpu_s) / max(end_s - start_s, 1e-9)
        return LoadResult(
            requests=requests,
            lag=_client_lag(watch.lag_s, requests, cpu_fraction),
            start_s=start_s,
            wall_s=end_s - start_s,
            out_of_time=not is_complete and not stop.is_set(),
            was_stopped=not is_complete and stop.is_set(),
        )

    async def send(self, index: int, due_s: float) -> None:
        """Send request `index` and keep what comes of it."""
        exchange = self.exchanges[index] = Exchange(due_s=due_s)
        self.view.exchanges.append(exchange)
        try:
            async with asyncio.timeout(self.limits.request_s):
                await self._carry_out(self.payloads[index], exchange)
        except asyncio.CancelledError:
            exchange.status, exchange.error = RequestStatus.CANCELLED, "the run ended"
            raise
        except TimeoutError as timeout:
            exchange.status = RequestStatus.TIMED_OUT
            exchange.error = str(timeout) or f"took over {self.limits.request_s:g} s"
        except (OSError, ConnectionLostError, ProtocolViolationError) as failure:
            exchange.status, exchange.error = RequestStatus.LOST, str(failure)
        finally:
            exchange.has_ended = True

    async def _carry_out(self, payload: bytes, exchange: Exchange) -> None:
        while True:
            connection = await self.pool.acquire()
            is_reused = connection.num_exchanges > 0
            self.active.add(connection)
            try:
                exchange.reply = connection.send(payload, exchange.stream)
                await connection.complete()
            except ConnectionLostError:
                # An idle connection may be closed in the moment that it is used again.
                heard = connection.reply is not None and connection.reply.last_read_s
                if not is_reused or heard:
                    raise
            else:
                self.pool.release(connection)
                return
            finally:
                self.active.discard(connection)
                if not (connection.reply and connection.reply.status):
                    connection.abort()


async def _done_before(work: asyncio.Task[None], stop: asyncio.Event, limit_s: float) -> bool:
    """Wait for the work, at most until `stop` or the limit; it is over when this returns."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, stopping}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        is_complete = work.done()
    finally:
        stopping.cancel()
        work.cancel()
        await asyncio.wait({work})
    if is_complete:
        work.result()
    return is_complete


def _unsent(end_s: float) -> Exchange:
    return Exchange(
        due_s=end_s, status=RequestStatus.CANCELLED, error="the run ended before it was sent"
    )


def _measured(
    exchange: Exchange, prompt: Prompt, *, start_s: float, exact_lengths: bool
) -> MeasuredRequest:
    """Return the record of a request; only a complete reply can be well."""
    stream, reply = exchange.stream, exchange.reply
    status, error = exchange.status, exchange.error
    if reply and status is RequestStatus.OK:
        status, error = _verdict(reply, stream, prompt if exact_lengths else None)
    sent_s = reply.sent_s if reply else exchange.due_s
    return MeasuredRequest(
        arrival_s=sent_s - start_s,
        late_s=max(sent_s - exchange.due_s, 0.0),
        isl=len(prompt.token_ids),
        osl=stream.num_tokens,
        chunk_s=tuple(at_s - sent_s for at_s in stream.chunk_s),
        chunk_tokens=tuple(stream.chunk_tokens),
        status=status,
        error=error,
    )


def _verdict(reply: Reply, stream: TokenStream, prompt: Prompt | None) -> tuple[RequestStatus, str]:
    """Return how a complete reply is to be judged; without a prompt, any length will do."""
    if reply.status != HTTP_OK:
        message = stream.head.decode("utf-8", "replace")
        return RequestStatus.REFUSED, f"HTTP {reply.status}: {message}"
    if stream.error:
        return RequestStatus.REFUSED, stream.error
    if prompt is None and stream.num_tokens:
        return RequestStatus.OK, ""
    if prompt is None:
        return RequestStatus.WRONG_LENGTH, "no tokens"
    if stream.num_tokens != prompt.osl:
        return RequestStatus.WRONG_LENGTH, f"{stream.num_tokens} tokens, not {prompt.osl}"
    return RequestStatus.OK, ""


def _client_lag(
    loop_lag_s: Sequence[float], requests: Sequence[MeasuredRequest], cpu_fraction: float
) -> ClientLag:
    late_s = [request.late_s for request in requests]
    return ClientLag(
        loop_lag_p99_s=percentile(loop_lag_s or [0.0], 0.99),
        loop_lag_max_s=max(loop_lag_s, default=0.0),
        late_send_p99_s=percentile(late_s or [0.0], 0.99),
        late_send_max_s=max(late_s, default=0.0),
        cpu_fraction=cpu_fraction,
    )


class _LoopWatch:
    """Samples how late the event loop runs its timers, and ends exchanges that fell silent."""

    INTERVAL_S = 0.02

    def __init__(self, active: set[StreamConnection], silence_limit_s: float) -> None:
        self.lag_s: list[float] = []
        self._active = active
        self._silence_limit_s = silence_limit_s

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            due_s = time.perf_counter() + self.INTERVAL_S
            await asyncio.sleep(self.INTERVAL_S)
            now_s = time.perf_counter()
            self.lag_s.append(now_s - due_s)
            self._end_silent_exchanges(now_s)

    def _end_silent_exchanges(self, now_s: float) -> None:
        oldest_s = now_s - self._silence_limit_s
        for connection in list(self._active):
            reply = connection.reply
            if reply and max(reply.sent_s, reply.last_read_s) < oldest_s:
                connection.fail(TimeoutError(f"silent for {self._silence_limit_s:g} s"))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection over a run's millions of objects would stop the clock of every stream."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
