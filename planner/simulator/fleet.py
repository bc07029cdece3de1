"""Servers behind a router, on one clock.

Events are ordered by time; at one time departures come first, then arrivals, then plans of
servers, each by number: so whatever is planned has seen everything that has come by then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from planner.simulator.arrivals import ArrivalSource
from planner.simulator.router import Router
from planner.simulator.server import Server

DEPARTURE, ARRIVAL, PLAN = range(3)
"""Kinds of events, in the order in which those of one time are handled."""


class Inbox:
    """A server's requests as a router submits them; an `ArrivalSource`."""

    def __init__(self, on_departure: Callable[[float], None]) -> None:
        self._submitted: deque[tuple[float, int]] = deque()
        self._on_departure = on_departure
        self.next_s = math.inf

    def submit(self, arrival_s: float, index: int) -> None:
        """Take a request at its time of arrival, in order."""
        if not self._submitted:
            self.next_s = arrival_s
        self._submitted.append((arrival_s, index))

    def take(self) -> int:
        """Hand the next request to the server and return its index."""
        _, index = self._submitted.popleft()
        self.next_s = self._submitted[0][0] if self._submitted else math.inf
        return index

    def finished(self, time_s: float) -> None:
        """A client has its last token, or a refusal."""
        self._on_departure(time_s)


class Fleet:
    """Routes the requests of a source to servers as they come.

    Args:
        source: All requests of the deployment.
        router: Who chooses the server.
        make_server: Makes the server of a number, given the source of its requests.
        num_servers: Servers behind the router.
    """

    def __init__(
        self,
        source: ArrivalSource,
        router: Router,
        make_server: Callable[[int, ArrivalSource], Server],
        num_servers: int,
    ) -> None:
        self.source, self.router = source, router
        self._events: list[tuple[float, int, int]] = []
        self._inboxes = [Inbox(self._departure_of(number)) for number in range(num_servers)]
        self.servers: Sequence[Server] = [
            make_server(number, inbox) for number, inbox in enumerate(self._inboxes)
        ]

    def run(self) -> None:
        """Serve until no request is left.

        Each request arrives and departs once, and a server plans only when its time has come: what
        its step takes moves that time on.
        """
        events = self._events
        while True:
            arrival_s = self.source.next_s
            # A departure may send the client's next request at the same moment.
            if events and events[0] < (arrival_s, ARRIVAL, 0):
                self._handle(*heappop(events))
            elif arrival_s < math.inf:
                self._route(arrival_s)
            else:
                return

    def _handle(self, time_s: float, kind: int, number: int) -> None:
        if kind == DEPARTURE:
            self.router.departed(number)
            self.source.finished(time_s)
            return
        server = self.servers[number]
        # A plan that something has moved since is handled at its new time.
        if server.next_s == time_s:
            if not server.settle():
                server.advance()
            self._await_plan(number)

    def _route(self, arrival_s: float) -> None:
        index = self.source.take()
        number = self.router.choose(index)
        server, before_s = self.servers[number], self.servers[number].next_s
        if server.turns_away(arrival_s, index):
            # At once, whatever the server does: its client may go on in the same moment.
            heappush(self._events, (arrival_s, DEPARTURE, number))
            return
        self._inboxes[number].submit(arrival_s, index)
        server.interrupt()
        if server.next_s != before_s:
            self._await_plan(number)

    def _await_plan(self, number: int) -> None:
        next_s = self.servers[number].next_s
        if next_s < math.inf:
            heappush(self._events, (next_s, PLAN, number))

    def _departure_of(self, number: int) -> Callable[[float], None]:
        return lambda time_s: heappush(self._events, (time_s, DEPARTURE, number))
