"""Capacity policies: who may hold KV blocks. One class each, in TensorRT-LLM's names."""

from __future__ import annotations

from typing import Protocol

from planner.simulator.kv_manager import KvManager
from planner.simulator.request import Request


class CapacityPolicy(Protocol):
    """Decides on admission, and on who pauses when blocks run out."""

    reserves: bool
    """Whether blocks are promised to completion, so that nobody is ever paused."""
    within_budget: bool
    """Whether only requests that the step's token budget reaches are admitted."""

    def opens(self, *, active: int) -> bool:
        """Whether the queue is looked at, given how many requests are held."""

    def fits(self, request: Request, kv: KvManager, *, growth_units: int) -> bool:
        """Whether the cache takes this request now.

        Args:
            request: Who is next in the queue.
            kv: The cache.
            growth_units: What the decoding sequences open in the next step.
        """


class GuaranteedNoEvict:
    """Blocks are reserved to completion: prompt and all output tokens the client allows."""

    reserves = True
    within_budget = False

    def opens(self, *, active: int) -> bool:  # noqa: ARG002  part of the protocol
        """Return True: each step may admit."""
        return True

    def fits(self, request: Request, kv: KvManager, *, growth_units: int) -> bool:  # noqa: ARG002
        """Whether its last token can be reserved beside all others'."""
        return kv.needed_units(request, request.final_tokens) <= kv.room(reserving=True)


class StaticBatch(GuaranteedNoEvict):
    """The same reservation, but new requests only when none is active."""

    def opens(self, *, active: int) -> bool:
        """Whether the last batch is gone."""
        return active == 0


class MaxUtilization:
    """Blocks for the next step only; when they run out the last started is paused."""

    reserves = False
    within_budget = False

    def opens(self, *, active: int) -> bool:  # noqa: ARG002  part of the protocol
        """Return True: each step may admit."""
        return True

    def fits(self, request: Request, kv: KvManager, *, growth_units: int) -> bool:
        """Whether prompt and next token find room beside what decodes in the next step."""
        need = kv.needed_units(request, min(request.prefill_len + 1, request.final_tokens))
        return need + growth_units <= kv.room(reserving=False)


class Recompute(MaxUtilization):
    """vLLM's rule: as MAX_UTILIZATION, but blocks are taken only when the prompt is scheduled."""

    within_budget = True


POLICIES: dict[str, type[CapacityPolicy]] = {
    "GUARANTEED_NO_EVICT": GuaranteedNoEvict,
    "MAX_UTILIZATION": MaxUtilization,
    "STATIC_BATCH": StaticBatch,
    "RECOMPUTE": Recompute,
}
"""Policies by the name that a configuration gives them."""
