"""Block reuse: prompts that begin alike share the physical blocks of their beginning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.simulator.block_pool import BlockPool
from planner.simulator.request import Request


@dataclass(slots=True)
class _Entry:
    """The blocks of one prefix hash, and how many running sequences read them."""

    table: list[int]
    readers: int = 0


@dataclass(slots=True, eq=False)
class PrefixCache:
    """Full prefix blocks by hash, least recently used first among those nobody reads.

    A hash stands for all that precedes it as well, so a prompt matches as far as its
    hashes are cached one after another. What nobody reads is evicted when the pool needs
    its blocks; it counts as used until then. Evicted blocks may go to host memory, from
    which a match brings them back.
    """

    pool: BlockPool
    blocks_per_hash: int
    host_blocks: int = 0
    """Blocks that host memory keeps."""
    onboarded: int = 0
    """Blocks brought back from the host since somebody asked."""
    pinned: int = 0
    """Blocks that running sequences read."""
    computing: set[int] = field(default_factory=set)
    """Hashes that a prefill under way is about to store."""
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _idle: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _on_host: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def cached_blocks(self) -> int:
        """Blocks that the cache holds, read or not."""
        return len(self._entries) * self.blocks_per_hash

    @property
    def idle_blocks(self) -> int:
        """Blocks that can be evicted."""
        return len(self._idle) * self.blocks_per_hash

    def matched(self, hashes: Sequence[int]) -> int:
        """Return how many leading hashes are cached."""
        entries, on_host = self._entries, self._on_host
        for count, key in enumerate(hashes):
            if key not in entries and key not in on_host:
                return count
        return len(hashes)

    def num_pinned(self, hashes: Sequence[int]) -> int:
        """Return how many of these cached hashes a running sequence reads."""
        entries = self._entries
        return sum(1 for key in hashes if key in entries and entries[key].readers)

    def next_is_computing(self, hashes: Sequence[int]) -> bool:
        """Whether the first missing block is being computed by another request."""
        count = self.matched(hashes)
        return count < len(hashes) and hashes[count] in self.computing

    def pin(self, request: Request, count: int) -> None:
        """Share the first `count` hashes' blocks with a request and keep them from eviction."""
        keys = request.hashes[:count]
        for key in keys:
            if key in self._entries:
                self._read(key)
        for key in keys:
            if key not in self._entries:
                self._onboard(key)
            request.table.extend(self._entries[key].table)
        request.pinned = count
        self.computing.update(request.hashes[count:])

    def _read(self, key: int) -> None:
        entry = self._entries[key]
        if entry.readers == 0:
            self._idle.pop(key)
            self.pinned += self.blocks_per_hash
        entry.readers += 1

    def _onboard(self, key: int) -> None:
        """Bring a prefix back from the host, for a reader."""
        size = self.blocks_per_hash
        self._on_host.pop(key)
        if self.pool.unnumbered_free < size:
            self.evict(size - self.pool.unnumbered_free)
        self._entries[key] = _Entry(self.pool.draw(size), readers=1)
        self.pinned += size
        self.onboarded += size

    def take_onboarded(self) -> int:
        """Return the blocks brought back since the last call."""
        blocks, self.onboarded = self.onboarded, 0
        return blocks

    def store(self, request: Request) -> int:
        """Keep the computed prefix of a request for others; return blocks that moved here.

        A hash that another request stored meanwhile stays private to this one, and so does
        everything behind it.
        """
        moved = 0
        size = self.blocks_per_hash
        for position in range(request.pinned, len(request.hashes)):
            key = request.hashes[position]
            if key in self._entries:
                break
            self._on_host.pop(key, None)
            blocks = request.table[position * size : (position + 1) * size]
            self._entries[key] = _Entry(blocks, readers=1)
            self.pinned += size
            moved += size
            request.pinned = position + 1
        self.computing.difference_update(request.hashes)
        return moved

    def unpin(self, request: Request) -> list[int]:
        """End a request's reading; return the blocks of its table that are its own."""
        for key in reversed(request.hashes[: request.pinned]):
            entry = self._entries[key]
            entry.readers -= 1
            if entry.readers == 0:
                self._idle[key] = None
                self.pinned -= self.blocks_per_hash
        own = request.table[request.pinned * self.blocks_per_hash :]
        self.computing.difference_update(request.hashes)
        request.pinned = 0
        return own

    def evict(self, blocks: int) -> int:
        """Drop idle prefixes, oldest first, until so many blocks are free; return how many."""
        freed = 0
        while freed < blocks and self._idle:
            key, _ = self._idle.popitem(last=False)
            table = self._entries.pop(key).table
            self._offload(key)
            self.pool.recycle(table)
            freed += len(table)
        return freed

    def _offload(self, key: int) -> None:
        """Keep an evicted prefix in host memory, in the place of the oldest there."""
        most = self.host_blocks // self.blocks_per_hash
        if most:
            self._on_host[key] = None
            if len(self._on_host) > most:
                self._on_host.popitem(last=False)
