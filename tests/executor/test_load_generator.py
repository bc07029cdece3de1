"""The load generator against a real server over a loopback socket."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from cost_models.errors import ConfigError
from executor.load_generator import Endpoint, LoadResult, Prompt, TimeLimits, run_load
from executor.protocols import ClosedLoop, LoadProtocol, OfflineBurst, OpenLoop
from executor.records import RequestStatus
from tests.executor.completion_server import HEAD, CompletionServer

LIMITS = TimeLimits(connect_s=5.0, silence_s=20.0, request_s=30.0, run_s=60.0)


def prompts(count: int, osl: int = 8) -> list[Prompt]:
    return [Prompt(token_ids=[index, 1, 2], osl=osl) for index in range(count)]


def load(
    server: CompletionServer,
    requests: list[Prompt],
    *,
    protocol: LoadProtocol,
    limits: TimeLimits = LIMITS,
) -> LoadResult:
    async def main() -> LoadResult:
        async with server.running():
            endpoint = Endpoint(port=server.port, model="m")
            return await run_load(endpoint, requests, protocol=protocol, limits=limits)

    return asyncio.run(main())


def statuses(result: LoadResult) -> list[RequestStatus]:
    return [request.status for request in result.requests]


def test_each_token_is_stamped_after_the_server_wrote_it_and_before_the_next() -> None:
    server = CompletionServer(gap_s=0.02)
    result = load(server, prompts(1), protocol=ClosedLoop(concurrency=1))
    request = result.requests[0]
    assert request.status is RequestStatus.OK
    assert (request.isl, request.osl, request.chunk_tokens) == (3, 8, (1,) * 8)
    sent_s = result.start_s + request.arrival_s
    # One clock and one event loop for both: after a write, the client reads before the timer.
    stamps_s = [sent_s + chunk_s for chunk_s in request.chunk_s]
    in_order = [time for pair in zip(server.written_s, stamps_s, strict=True) for time in pair]
    assert in_order == sorted(in_order)
    assert request.ttft_s >= 0.02
    assert request.e2el_s == pytest.approx(request.ttft_s + sum(request.itl_s))


@pytest.mark.parametrize("splits", [False, True])
def test_chunks_that_carry_several_tokens_are_counted(splits: bool) -> None:
    server = CompletionServer(tokens_per_chunk=3, splits_events=splits)
    request = load(server, prompts(1), protocol=OfflineBurst()).requests[0]
    assert request.chunk_tokens == (3, 3, 2)
    assert (request.osl, request.status) == (8, RequestStatus.OK)
    assert len(request.itl_s) == 2


def test_a_server_without_counts_is_counted_by_event() -> None:
    server = CompletionServer(counts_tokens=False)
    request = load(server, prompts(1), protocol=OfflineBurst()).requests[0]
    assert (request.osl, request.status) == (8, RequestStatus.OK)


def test_wrong_length_is_a_result() -> None:
    result = load(CompletionServer(short_by=2), prompts(2), protocol=OfflineBurst())
    assert statuses(result) == [RequestStatus.WRONG_LENGTH] * 2
    assert result.requests[0].error == "6 tokens, not 8"


def test_a_connection_that_breaks_keeps_the_tokens_before_it() -> None:
    server = CompletionServer(dies_after=3, gap_s=0.01)
    result = load(server, prompts(3), protocol=OfflineBurst())
    assert statuses(result) == [RequestStatus.LOST, RequestStatus.OK, RequestStatus.OK]
    assert result.requests[0].osl == 3


def test_a_server_that_never_answers_runs_into_the_silence_limit() -> None:
    limits = replace(LIMITS, silence_s=0.1)
    result = load(
        CompletionServer(is_silent=True), prompts(2), protocol=OfflineBurst(), limits=limits
    )
    assert statuses(result) == [RequestStatus.TIMED_OUT] * 2
    assert result.requests[0].error == "silent for 0.1 s"


def test_a_server_that_is_too_slow_runs_into_the_request_limit() -> None:
    limits = replace(LIMITS, request_s=0.2)
    server = CompletionServer(gap_s=0.05)
    result = load(server, prompts(1, osl=100), protocol=OfflineBurst(), limits=limits)
    request = result.requests[0]
    assert (request.status, request.error) == (RequestStatus.TIMED_OUT, "took over 0.2 s")
    assert 0 < request.osl < 100


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (CompletionServer(http_status=404), "HTTP 404"),
        (CompletionServer(sends_error=True), "out of blocks"),
    ],
)
def test_a_refusal_is_a_result_with_the_servers_words(
    server: CompletionServer, message: str
) -> None:
    result = load(server, prompts(2), protocol=ClosedLoop(concurrency=1))
    assert statuses(result) == [RequestStatus.REFUSED] * 2
    assert message in result.requests[0].error


def test_the_run_limit_ends_everything_and_the_server_sees_it() -> None:
    server = CompletionServer(gap_s=0.05)
    limits = replace(LIMITS, run_s=0.3)

    async def main() -> LoadResult:
        async with server.running():
            endpoint = Endpoint(port=server.port, model="m")
            result = await run_load(
                endpoint, prompts(5, osl=1000), protocol=ClosedLoop(concurrency=2), limits=limits
            )
            while server.num_active:
                await asyncio.sleep(0.01)
            return result

    result = asyncio.run(asyncio.wait_for(main(), 20))
    assert result.out_of_time
    assert statuses(result) == [RequestStatus.CANCELLED] * 5
    assert [request.osl > 0 for request in result.requests] == [True, True, False, False, False]
    assert server.num_broken_off == 2


def test_cancelling_drops_the_connections() -> None:
    server = CompletionServer(gap_s=0.05)

    async def main() -> None:
        async with server.running():
            run = asyncio.create_task(
                run_load(
                    Endpoint(port=server.port, model="m"),
                    prompts(2, osl=1000),
                    protocol=OfflineBurst(),
                )
            )
            while server.num_active < 2:
                await asyncio.sleep(0.01)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            while server.num_active:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert server.num_broken_off == 2


def test_a_closed_loop_keeps_its_clients_and_their_connections() -> None:
    server = CompletionServer(gap_s=0.002)
    result = load(server, prompts(12, osl=3), protocol=ClosedLoop(concurrency=4))
    assert statuses(result) == [RequestStatus.OK] * 12
    assert (server.most_active, server.num_connections) == (4, 4)


def test_an_offline_burst_is_in_flight_all_at_once() -> None:
    server = CompletionServer(waits_for=20)
    result = load(server, prompts(20), protocol=OfflineBurst())
    assert statuses(result) == [RequestStatus.OK] * 20


def test_an_open_loop_does_not_wait_for_the_server() -> None:
    server = CompletionServer(waits_for=5)
    arrival_s = [0.0, 0.02, 0.02, 0.05, 0.09]
    result = load(server, prompts(5), protocol=OpenLoop(arrival_s=arrival_s))
    assert statuses(result) == [RequestStatus.OK] * 5
    starts_s = [
        request.arrival_s - request.late_s - due_s
        for request, due_s in zip(result.requests, arrival_s, strict=True)
    ]
    assert starts_s == pytest.approx([starts_s[0]] * 5, abs=1e-6)
    assert starts_s[0] >= 0


def test_an_open_loop_wants_an_arrival_for_each_request() -> None:
    with pytest.raises(ConfigError, match="1 arrivals for 2 requests"):
        load(CompletionServer(), prompts(2), protocol=OpenLoop(arrival_s=[0.0]))


def test_an_idle_connection_that_was_closed_is_replaced() -> None:
    server = CompletionServer(closes_idle=True)
    result = load(server, prompts(6), protocol=ClosedLoop(concurrency=1))
    assert statuses(result) == [RequestStatus.OK] * 6
    assert server.num_connections == 6


def test_no_server_at_all_is_an_error() -> None:
    async def main() -> None:
        async with CompletionServer().running() as server:
            port = server.port
        await run_load(Endpoint(port=port, model="m"), prompts(1), protocol=OfflineBurst())

    with pytest.raises(OSError, match="Connect"):
        asyncio.run(main())


class FloodServer(CompletionServer):
    """Writes a whole reply at once, as cheaply as it can."""

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        del reader
        events = b"".join(b"data: %b\n\n" % e for e in self._events(request["max_tokens"]))
        writer.write(HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(events), events))


def test_one_core_reads_twenty_thousand_tokens_a_second() -> None:
    """By processor time, the server's included: other programs here leave it nearly alone."""
    start_s = time.thread_time()
    result = load(FloodServer(), prompts(40, osl=500), protocol=ClosedLoop(concurrency=8))
    cpu_s = time.thread_time() - start_s
    assert statuses(result) == [RequestStatus.OK] * 40
    assert 40 * 500 / cpu_s > 20_000


def test_a_client_that_is_held_up_says_so() -> None:
    server = CompletionServer(gap_s=0.01)

    async def main() -> LoadResult:
        async with server.running():
            asyncio.get_running_loop().call_later(0.05, time.sleep, 0.3)
            return await run_load(
                Endpoint(port=server.port, model="m"),
                prompts(2, osl=20),
                protocol=OfflineBurst(),
            )

    result = asyncio.run(main())
    assert result.lag.limits_the_run
    assert result.lag.loop_lag_max_s >= 0.25
    assert result.longest_silence_s >= 0.25
    assert result.lag.to_json()["limited"] is True


def test_nothing_is_lost_or_sent_twice() -> None:
    server = CompletionServer(dies_after=2, gap_s=0.001)
    result = load(server, prompts(60), protocol=ClosedLoop(concurrency=7))
    assert Counter(statuses(result)) == {RequestStatus.OK: 59, RequestStatus.LOST: 1}
    assert len(server.written_s) == 59 * 8 + 2
