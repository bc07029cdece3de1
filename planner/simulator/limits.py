"""What bounds one engine: batch, tokens, blocks, and the rules by which it schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from cost_models.engine import EngineConfig
from cost_models.engine_traits import EngineTraits
from cost_models.memory import MemoryPlan
from planner.simulator.block_pool import PoolShape
from planner.simulator.capacity import POLICIES, CapacityPolicy, GuaranteedNoEvict
from planner.simulator.chunking import Chunking, EqualProgress, FirstComeChunks, WholePrompts
from planner.simulator.queue_order import ORDERS, FirstComeFirstServed, QueueOrder


class Refusal(IntEnum):
    """Which limit turns a request away."""

    NONE = 0
    MAX_SEQ_LEN = 1
    """The prompt leaves no room for a token."""
    MAX_NUM_TOKENS = 2
    """The prompt is longer than a step, and prompts are not chunked."""
    KV_CACHE = 3
    """The whole KV cache cannot hold the prompt and the output that the client allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """One scheduler with its own batch and its own KV cache."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    pool: PoolShape
    tokens_per_decode: float = 1.0
    """What a decoding sequence takes of a step's tokens: its own, and the drafts to verify."""
    capacity: CapacityPolicy = field(default_factory=GuaranteedNoEvict)
    order: QueueOrder = field(default_factory=FirstComeFirstServed)
    chunking: Chunking = field(default_factory=WholePrompts)
    overlap: bool = True
    """Whether a step is scheduled while the one before it runs."""
    enable_block_reuse: bool = False
    enable_partial_reuse: bool = False
    """Whether a prefix that ends inside a block is copied from there."""
    host_blocks: int = 0
    """Evicted prefix blocks that host memory keeps."""
    onboard_block_s: float = 0.0
    """Time to bring one of them back."""

    @property
    def chunks(self) -> bool:
        """Whether a prompt may be spread over steps."""
        return not isinstance(self.chunking, WholePrompts)

    def refusal(self, *, isl: int, max_tokens: int) -> Refusal:
        """Return why the engine turns a request away at submission, if it does.

        Args:
            isl: Prompt tokens.
            max_tokens: Output tokens that the client allows.
        """
        if isl >= self.max_seq_len:
            return Refusal.MAX_SEQ_LEN
        if not self.chunks and isl > self.max_num_tokens:
            return Refusal.MAX_NUM_TOKENS
        final = min(isl + max_tokens, self.max_seq_len) - 1
        if self.pool.units(final, final_tokens=final) > self.pool.capacity:
            return Refusal.KV_CACHE
        return Refusal.NONE

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        memory: MemoryPlan,
        *,
        max_seq_len: int,
        host_link_bytes_per_s: float,
        engine: EngineTraits,
    ) -> EngineLimits:
        """Return the limits of one scheduler of a configuration.

        That is a server's only one, or one of its attention-DP ranks or pipeline micro-batches,
        which divide the server's blocks.
        """
        equal = config.context_chunking_policy == "EQUAL_PROGRESS"
        chunk = EqualProgress if equal else FirstComeChunks
        block_bytes = memory.layout.bytes_per_token * config.tokens_per_block
        chunking = (
            chunk(engine.chunk_unit(config)) if config.enable_chunked_prefill else WholePrompts()
        )
        return cls(
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.max_num_tokens,
            max_seq_len=config.max_seq_len or max_seq_len,
            pool=PoolShape.of(
                memory.layout,
                num_blocks=int(memory.kv_cache_blocks) // config.num_instances,
                tokens_per_block=config.tokens_per_block,
            ),
            order=ORDERS[config.queue_order],
            capacity=POLICIES[config.capacity_scheduler_policy](),
            chunking=chunking,
            overlap=not config.disable_overlap_scheduler,
            enable_block_reuse=config.enable_block_reuse,
            enable_partial_reuse=config.enable_partial_reuse and engine.reuses_partial_blocks,
            host_blocks=int(config.host_cache_size / block_bytes),
            onboard_block_s=block_bytes / host_link_bytes_per_s,
        )
