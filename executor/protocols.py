"""When requests are sent: at given times, when an earlier one ends, or all at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cost_models.errors import ConfigError

Send = Callable[[int, float], Awaitable[None]]
"""Sends request `index`, which was due at a time of `time.perf_counter`; returns at its end."""


class LoadProtocol(Protocol):
    """Decides when each of a run's requests is sent."""

    def connections(self, num_requests: int) -> int:
        """Return how many connections to open before the first request."""

    async def drive(self, num_requests: int, send: Send) -> None:
        """Send every request and return when the last has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests arrive on their own clock, however slow the server is."""

    arrival_s: Sequence[float]
    """From the start of the run, ascending, one for each request."""

    def connections(self, num_requests: int) -> int:  # noqa: ARG002  part of the protocol
        """Open one: each request finds an idle connection or makes its own."""
        return 1

    async def drive(self, num_requests: int, send: Send) -> None:
        """Send request i at `arrival_s[i]`.

        Raises:
            ConfigError: Not one arrival for each request.
        """
        if num_requests != len(self.arrival_s):
            raise ConfigError(f"{len(self.arrival_s)} arrivals for {num_requests} requests")
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as requests:
            for index, arrival_s in enumerate(self.arrival_s):
                due_s = start_s + arrival_s
                await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
                requests.create_task(_sent(send, index, due_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """A fixed number of clients, each of which sends its next request when the last one ends."""

    concurrency: int

    def connections(self, num_requests: int) -> int:
        """Open one for each client."""
        return min(self.concurrency, num_requests)

    async def drive(self, num_requests: int, send: Send) -> None:
        """Start all clients together; they share one list of requests."""
        waiting = iter(range(num_requests))

        async def client() -> None:
            for index in waiting:
                await send(index, time.perf_counter())

        async with asyncio.TaskGroup() as clients:
            for _ in range(self.connections(num_requests)):
                clients.create_task(client())


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineBurst:
    """Everything is queued at the start."""

    def connections(self, num_requests: int) -> int:
        """Open one for each request."""
        return num_requests

    async def drive(self, num_requests: int, send: Send) -> None:
        """Send all requests at once: a closed loop in which every client has one."""
        await ClosedLoop(concurrency=num_requests).drive(num_requests, send)


async def _sent(send: Send, index: int, due_s: float) -> None:
    await send(index, due_s)
