"""The KV cache as a pool of blocks: allocation, growth token by token, recycling.

One unit is a block of the layers with full attention. Layers with a sliding window stop
growing, so a sequence is charged for their blocks at once. Where both exist the unit is
a byte, and all layers draw on one budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.kv_cache import KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShape:
    """How many units sequences take."""

    tokens_per_block: int
    capacity: int
    """Units in all."""
    full_units: int = 1
    """Units of one block of the full-attention layers; 0 without such layers."""
    windows: tuple[tuple[int, int], ...] = ()
    """(most blocks, units of a block) of each group of sliding-window layers."""
    contiguous_tokens: int = 0
    """Pre-allocated length of every sequence; 0 pages."""

    @classmethod
    def of(cls, layout: KvLayout, *, num_blocks: int, tokens_per_block: int) -> PoolShape:
        """Return the shape of a cache that holds `num_blocks` blocks of every layer."""
        if len(layout.pools) == 1 and layout.pools[0].window_size == 0:
            return cls(tokens_per_block=tokens_per_block, capacity=num_blocks)
        weights = {
            pool.window_size: round(pool.bytes_per_token * tokens_per_block)
            for pool in layout.pools
        }
        windows = tuple(
            (-(-window // tokens_per_block) + 1, units)
            for window, units in weights.items()
            if window
        )
        return cls(
            tokens_per_block=tokens_per_block,
            capacity=num_blocks * sum(weights.values()),
            full_units=weights.get(0, 0),
            windows=windows,
        )

    def units(self, tokens: int, *, final_tokens: int) -> int:
        """Return the units of a sequence of `tokens` that will end at `final_tokens` at most."""
        block = self.tokens_per_block
        if self.contiguous_tokens:
            return -(-self.contiguous_tokens // block) * self.full_units
        total = -(-tokens // block) * self.full_units
        for most, units in self.windows:
            total += min(-(-final_tokens // block), most) * units
        return total

    @property
    def growth_units(self) -> int:
        """Units of a block that a sequence opens while it decodes."""
        return 0 if self.contiguous_tokens else self.full_units


class BlockPool:
    """Blocks in use, and how they will grow while sequences decode.

    A sequence whose context starts its decoding at residue r modulo the block size opens a
    block every `tokens_per_block` steps. Counting sequences by that residue gives the
    growth over any number of steps without looking at one of them.

    Physical blocks of prompts are handed out by number. Blocks opened by decoding are
    counted when they are opened and stay unnumbered until `settle` asks for them.
    """

    def __init__(self, shape: PoolShape) -> None:
        self.shape = shape
        self.used = 0
        self.reserved = 0
        self.growing = 0
        """Sequences that decode."""
        self._growth_units = shape.growth_units
        self._block_tokens = shape.tokens_per_block
        self._residues = [0] * (2 * shape.tokens_per_block)
        """Sequences by residue, twice over: any run of steps within a cycle is one slice."""
        blocks = shape.capacity // shape.growth_units if shape.growth_units else 0
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Units that nobody uses; promises not counted."""
        return self.shape.capacity - self.used

    @property
    def unnumbered_free(self) -> int:
        """Physical blocks on the free list, those counted but not yet settled included."""
        return len(self._free)

    def draw(self, blocks: int) -> list[int]:
        """Take physical blocks off the free list."""
        if blocks <= 0:
            return []
        if blocks > len(self._free):
            raise AssertionError(f"{blocks} blocks asked of {len(self._free)} free ones")
        table = self._free[-blocks:]
        del self._free[-blocks:]
        return table

    def recycle(self, table: Sequence[int]) -> None:
        """Put physical blocks back on the free list."""
        self._free.extend(table)

    def settle(self, table: list[int], tokens: int) -> None:
        """Number the blocks that a sequence of `tokens` has opened beyond its table."""
        table.extend(self.draw(-(-tokens // self.shape.tokens_per_block) - len(table)))

    def start_growth(self, context_offset: int) -> None:
        """A sequence begins to decode."""
        self._count(context_offset, 1)

    def stop_growth(self, context_offset: int) -> None:
        """A sequence decodes no more."""
        self._count(context_offset, -1)

    def _count(self, context_offset: int, sequences: int) -> None:
        residue = (1 - context_offset) % self._block_tokens
        self._residues[residue] += sequences
        self._residues[residue + self._block_tokens] += sequences
        self.growing += sequences

    def growth(self, steps_taken: int, steps: int) -> int:
        """Return the units that all decoding sequences open in the next `steps` steps."""
        block = self._block_tokens
        cycles, rest = divmod(steps, block)
        opened = cycles * self.growing
        if rest:
            first = (steps_taken + 1) % block
            opened += sum(self._residues[first : first + rest])
        return opened * self._growth_units

    def steps_within(self, steps_taken: int, units: int, most: int) -> int:
        """Return how many of the next `most` steps need no more than `units`."""
        weight = self._growth_units
        block = self._block_tokens
        if -(-most // block) * self.growing * weight <= units:
            return most
        sure = units // max(self.growing * weight, 1) * block
        steps = min(sure, most)
        left = units - self.growth(steps_taken, steps)
        while steps < most:
            left -= self._residues[(steps_taken + steps + 1) % block] * weight
            if left < 0:
                break
            steps += 1
        return steps
