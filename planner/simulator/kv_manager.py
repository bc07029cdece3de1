"""Charges sequences to the block pool: at admission, while they grow, when they leave."""

from __future__ import annotations

from planner.simulator.block_pool import BlockPool, PoolShape
from planner.simulator.prefix_cache import PrefixCache
from planner.simulator.request import Request


class KvManager:
    """One KV cache: the pool, the prefix cache over it, and what each sequence is charged.

    `pool.used` holds what running sequences have in private; shared prefix blocks are the
    cache's. `pool.reserved` holds what the policy has promised.
    """

    __slots__ = ("_hash_tokens", "_shape", "cache", "pool")

    def __init__(
        self, shape: PoolShape, *, reuse_hash_tokens: int = 0, host_blocks: int = 0
    ) -> None:
        self.pool = BlockPool(shape)
        self._shape = shape
        self._hash_tokens = reuse_hash_tokens
        self.cache = (
            PrefixCache(
                self.pool, reuse_hash_tokens // shape.tokens_per_block, host_blocks=host_blocks
            )
            if reuse_hash_tokens
            else None
        )
        """The prefix cache; None without block reuse."""

    @property
    def occupied(self) -> int:
        """Units held by running sequences, shared prefixes counted once."""
        return self.pool.used + (self.cache.pinned if self.cache else 0)

    def needed_units(self, request: Request, tokens: int) -> int:
        """Return the units of room that a request of `tokens` takes, beside prefixes in use."""
        units = self._shape.units(tokens, final_tokens=request.final_tokens)
        cache = self.cache
        if cache is None or not request.hashes:
            return units
        in_use = cache.num_pinned(request.hashes[: self._reusable(cache, request)])
        return units - in_use * cache.blocks_per_hash

    def _own_units(self, request: Request, tokens: int) -> int:
        """Return the units that are a request's alone, its shared prefix left out."""
        units = self._shape.units(tokens, final_tokens=request.final_tokens)
        if self.cache is None:
            return units
        return units - request.pinned * self.cache.blocks_per_hash

    def must_wait(self, request: Request) -> bool:
        """Whether the next block of its prompt is being computed by an earlier request."""
        if self.cache is None or not request.hashes:
            return False
        return self.cache.next_is_computing(request.hashes)

    def room(self, *, reserving: bool) -> int:
        """Return units that may be given or promised; idle prefixes make way."""
        pool = self.pool
        taken = pool.reserved if reserving else pool.used
        return self._shape.capacity - taken - (self.cache.pinned if self.cache else 0)

    def admit(self, request: Request, *, reserving: bool) -> None:
        """Give a request the blocks of its prompt and, if the policy reserves, promise the rest."""
        if self.cache is not None and request.hashes:
            self._share(self.cache, request)
        if reserving:
            request.reserved = self._own_units(request, request.final_tokens)
            self.pool.reserved += request.reserved
        request.blocks = self._own_units(request, request.prefill_len)
        self.pool.used += request.blocks
        self.make_room()
        block = self._shape.tokens_per_block
        request.table.extend(
            self.pool.draw(-(-request.prefill_len // block) - len(request.table))
            if self._shape.growth_units
            else ()
        )

    def take_onboarded(self) -> int:
        """Return the blocks that came back from host memory since the last call."""
        return self.cache.take_onboarded() if self.cache else 0

    def prefilled(self, request: Request) -> None:
        """The prompt is computed: its full blocks can be shared from now on."""
        if self.cache is not None and request.hashes:
            moved = self.cache.store(request)
            self.pool.used -= moved
            request.blocks -= moved
            promised = moved if request.reserved else 0
            request.reserved -= promised
            self.pool.reserved -= promised

    def start_decoding(self, request: Request) -> None:
        """The sequence grows by one token a step from now on."""
        self.pool.start_growth(request.context_offset)

    def stop_decoding(self, request: Request, steps_taken: int) -> None:
        """The sequence grows no more; charge it for what it has opened."""
        self.pool.stop_growth(request.context_offset)
        shape = self._shape
        if shape.growth_units:
            block = shape.tokens_per_block
            context = request.context_offset + steps_taken
            opened = -(-context // block) - -(-request.prefill_len // block)
            request.blocks += opened * shape.growth_units

    def grow(self, steps_taken: int, steps: int) -> None:
        """Charge the pool for consecutive steps of all decoding sequences."""
        self.pool.used += self.pool.growth(steps_taken, steps)
        if self.cache is not None:
            self.make_room()

    def make_room(self) -> None:
        """Evict idle prefixes until sequences and cache fit together."""
        cache = self.cache
        if cache is not None:
            over = self.pool.used + cache.cached_blocks - self._shape.capacity
            if over > 0:
                cache.evict(over)

    def release(self, request: Request) -> None:
        """Take back everything that a request was given and promised."""
        self.pool.used -= request.blocks
        self.pool.reserved -= request.reserved
        own = request.table
        if self.cache is not None and request.hashes:
            own = self.cache.unpin(request)
        self.pool.recycle(own)
        request.blocks = request.reserved = 0
        request.table = []

    def _share(self, cache: PrefixCache, request: Request) -> None:
        matched = self._reusable(cache, request)
        cache.pin(request, matched)
        request.cached_tokens = matched * self._hash_tokens
        if matched and matched == len(request.hashes):
            left = request.prefill_len - 1 - request.cached_tokens
            request.cached_tokens += min(request.prefix_tail, left)
        request.prefilled = request.cached_tokens

    def _reusable(self, cache: PrefixCache, request: Request) -> int:
        """Cached leading hashes; the last prompt token is always computed, to be sampled."""
        most = (request.prefill_len - 1) // self._hash_tokens
        return min(cache.matched(request.hashes), most)
