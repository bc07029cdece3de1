"""How a step's token budget is divided among the prompts that wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from planner.simulator.request import Request

Chunks = list[tuple[Request, int]]
"""Requests and the prompt tokens that each computes in this step."""


class Chunking(Protocol):
    """Divides a budget; every request of `prompts` holds its KV blocks already."""

    def divide(self, prompts: Sequence[Request], budget: int) -> Chunks:
        """Return the chunks of this step, in the order of `prompts`."""


class WholePrompts:
    """Chunked prefill off: a prompt waits until the budget takes all of it."""

    def divide(self, prompts: Sequence[Request], budget: int) -> Chunks:
        """Take whole prompts in order and stop at the first that does not fit.

        What a paused request has to compute again may exceed every budget: it goes alone.
        """
        chunks: Chunks = []
        for request in prompts:
            tokens = request.prefill_len - request.prefilled
            if tokens > budget and (chunks or not request.generated):
                break
            budget -= tokens
            chunks.append((request, tokens))
        return chunks


class FirstComeChunks:
    """FIRST_COME_FIRST_SERVED: the first prompts take all they can."""

    def __init__(self, chunk_unit: int) -> None:
        self.chunk_unit = chunk_unit

    def divide(self, prompts: Sequence[Request], budget: int) -> Chunks:
        """Give each what is left of the budget; a chunk that does not end a prompt is rounded."""
        chunks: Chunks = []
        for request in prompts:
            tokens = request.prefill_len - request.prefilled
            if tokens > budget:
                tokens = budget // self.chunk_unit * self.chunk_unit
            if tokens <= 0:
                break
            budget -= tokens
            chunks.append((request, tokens))
        return chunks


class EqualProgress:
    """EQUAL_PROGRESS: prompts advance by one unit in turn until the budget is gone."""

    def __init__(self, chunk_unit: int) -> None:
        self.chunk_unit = chunk_unit

    def divide(self, prompts: Sequence[Request], budget: int) -> Chunks:
        """Deal out units round robin."""
        taken = [0] * len(prompts)
        open_prompts: Iterable[int] = range(len(prompts))
        while open_prompts:
            still_open = []
            for i in open_prompts:
                left = prompts[i].remaining_prefill - taken[i]
                tokens = min(self.chunk_unit, left)
                if tokens > budget:
                    continue
                taken[i] += tokens
                budget -= tokens
                if left > tokens:
                    still_open.append(i)
            open_prompts = still_open
        return [(request, tokens) for request, tokens in zip(prompts, taken, strict=True) if tokens]
