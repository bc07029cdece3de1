"""Routers: which server of a deployment takes a request. One class each; state is their own.

A router sees a request at its time of arrival, and learns when one has left. Those whose choice
rests on nothing that servers do are static: each server's requests are known before time starts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

from planner.simulator.requests import Requests

PREFIX_BLOCKS = 1 << 20
"""Blocks that a prefix-aware router remembers for each server."""

MOST_IMBALANCE = 4
"""Requests by which a server with the prefix may be ahead of the least loaded one."""


class Router(Protocol):
    """Chooses a server for each request, in order of arrival."""

    is_static: bool
    """Whether choices rest on nothing that servers do."""

    def choose(self, index: int) -> int:
        """Return the number of the server that takes a request."""

    def departed(self, server: int) -> None:
        """Learn that a request of a server has its last token, or was refused."""


class RoundRobin:
    """Each server in turn."""

    is_static = True

    def __init__(self, requests: Requests, num_servers: int) -> None:  # noqa: ARG002  one contract
        self._num_servers = num_servers
        self._next = 0

    def choose(self, index: int) -> int:  # noqa: ARG002  whatever is asked
        """Return the next server."""
        chosen = self._next
        self._next = (chosen + 1) % self._num_servers
        return chosen

    def departed(self, server: int) -> None:
        """Nothing is counted."""


class LeastOutstanding:
    """The server with the fewest requests under way; of equals the next in turn."""

    is_static = False

    def __init__(self, requests: Requests, num_servers: int) -> None:  # noqa: ARG002  one contract
        self.outstanding = [0] * num_servers
        self._turn = 0

    def choose(self, index: int) -> int:  # noqa: ARG002  only counts decide
        """Return the least loaded server."""
        return self.taken(self.least())

    def least(self) -> int:
        """Return the number of the least loaded server."""
        number = len(self.outstanding)
        turns = ((self._turn + offset) % number for offset in range(number))
        return min(turns, key=self.outstanding.__getitem__)

    def taken(self, server: int) -> int:
        """Count a request that goes to a server."""
        self.outstanding[server] += 1
        self._turn = (server + 1) % len(self.outstanding)
        return server

    def departed(self, server: int) -> None:
        """One request less is under way."""
        self.outstanding[server] -= 1


class PrefixAware:
    """The server that was sent most of the prompt's prefix before, unless it is too far ahead.

    So work the cache-aware routers of SGLang and of `trtllm-serve disaggregated`
    (`kv_cache_aware`): they weigh the blocks that a server is believed to hold against its load.
    """

    is_static = False

    def __init__(self, requests: Requests, num_servers: int) -> None:
        self._load = LeastOutstanding(requests, num_servers)
        self._hashes: Sequence[Sequence[int]] | None = requests.prefix_hashes
        self._held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_servers)]

    def choose(self, index: int) -> int:
        """Return the server with the longest known prefix among those that are not too loaded."""
        hashes = self._hashes[index] if self._hashes is not None else ()
        load, least = self._load.outstanding, self._load.least()
        near = [n for n, count in enumerate(load) if count <= load[least] + MOST_IMBALANCE]
        best = max(near, key=lambda n: (self._matched(n, hashes), n == least))
        self._remember(best, hashes)
        return self._load.taken(best)

    def departed(self, server: int) -> None:
        """One request less is under way."""
        self._load.departed(server)

    def _matched(self, server: int, hashes: Sequence[int]) -> int:
        held, matched = self._held[server], 0
        for block in hashes:
            if block not in held:
                break
            matched += 1
        return matched

    def _remember(self, server: int, hashes: Sequence[int]) -> None:
        held = self._held[server]
        for block in hashes:
            held[block] = None
            held.move_to_end(block)
        while len(held) > PREFIX_BLOCKS:
            held.popitem(last=False)


class RouterFactory(Protocol):
    """Makes a router for the requests of a deployment and its number of servers."""

    is_static: bool

    def __call__(self, requests: Requests, num_servers: int) -> Router:
        """Return a router that has seen nothing yet."""


ROUTERS: Mapping[str, RouterFactory] = {
    "round_robin": RoundRobin,
    "least_outstanding": LeastOutstanding,
    "prefix_aware": PrefixAware,
}
"""Routers by the name that a deployment gives them."""
