"""What a run sends: lengths, token ids and times; and what goes before it to warm an engine up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from executor.load_generator import Prompt
from executor.protocols import ClosedLoop, LoadProtocol, OfflineBurst, OpenLoop

SPECIAL_TOKENS = 3000
"""Ids at the end of common vocabularies that are no text; left out where there is room."""

FIRST_TOKEN = 10

WARM_UP_OSL = 8
WARM_UP_SAMPLE_OSL = 32

MOST_WARM_UP_CLIENTS = 512

MOST_WARM_UP_TOKENS = 200_000
"""Prompt tokens of the mix that ends a warm-up: seconds on a datacenter GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests of one run, in order."""

    isl: Sequence[int]
    osl: Sequence[int]
    protocol: LoadProtocol
    workload: Mapping[str, Any]
    """The `workload` section of the run's record."""
    shared_prefix_tokens: int = 0
    """Tokens with which every prompt begins, the same in all."""

    def prompts(self, *, vocab_size: int, seed: int) -> list[Prompt]:
        """Return the prompts with token ids of their own for each seed.

        Repeats with the same token ids would be answered out of a prefix cache.
        """
        return random_prompts(
            self.isl,
            self.osl,
            vocab_size=vocab_size,
            seed=seed,
            shared_prefix_tokens=self.shared_prefix_tokens,
        )

    @property
    def most_clients(self) -> int:
        """Requests that can be in flight together."""
        if isinstance(self.protocol, ClosedLoop):
            return min(self.protocol.concurrency, len(self.isl))
        return len(self.isl)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUpRound:
    """Some requests of a warm-up, sent by some clients."""

    isl: Sequence[int]
    osl: Sequence[int]
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """What an engine has been warmed up for."""

    prompt_tokens: int = 0
    """Longest prompt."""
    clients: int = 0
    """Most sequences at a time."""

    def and_more(self, other: Warmth) -> Warmth:
        """Return what both cover."""
        return Warmth(
            prompt_tokens=max(self.prompt_tokens, other.prompt_tokens),
            clients=max(self.clients, other.clients),
        )


def random_prompts(
    isl: Sequence[int],
    osl: Sequence[int],
    *,
    vocab_size: int,
    seed: int,
    shared_prefix_tokens: int = 0,
) -> list[Prompt]:
    """Return prompts of exact lengths with random token ids."""
    rng = np.random.default_rng(seed)
    highest = max(vocab_size - SPECIAL_TOKENS, vocab_size // 2, FIRST_TOKEN + 1)
    prefix = np.random.default_rng(0).integers(FIRST_TOKEN, highest, shared_prefix_tokens).tolist()
    prompts = []
    for length, output in zip(isl, osl, strict=True):
        shared = prefix[: max(length - 1, 0)]
        own = rng.integers(FIRST_TOKEN, highest, length - len(shared)).tolist()
        prompts.append(Prompt(token_ids=shared + own, osl=output))
    return prompts


def warmth_for(traffic: Traffic, *, max_batch_size: int) -> Warmth:
    """Return what an engine must be warmed up for before the traffic is measured."""
    clients = min(traffic.most_clients, max_batch_size, MOST_WARM_UP_CLIENTS)
    return Warmth(prompt_tokens=max(traffic.isl), clients=clients)


def warm_up_rounds(traffic: Traffic, needed: Warmth, done: Warmth) -> Iterator[WarmUpRound]:
    """Yield what makes an engine compile and tune every kind of step that the traffic needs.

    Prompts alone by length, batches of decoding sequences by size, then a mix of both.

    Args:
        traffic: What will be measured.
        needed: What that needs.
        done: What was warmed up since the engine's start; it is not repeated.
    """
    lengths = [n for n in _doubling(needed.prompt_tokens) if n > done.prompt_tokens]
    if lengths:
        yield WarmUpRound(isl=lengths, osl=[2] * len(lengths), concurrency=1)
    short = min(needed.prompt_tokens, 32)
    for size in _doubling(needed.clients):
        if size > done.clients:
            yield WarmUpRound(isl=[short] * size, osl=[WARM_UP_OSL] * size, concurrency=size)
    count = _within(traffic.isl, MOST_WARM_UP_TOKENS, most=2 * needed.clients)
    yield WarmUpRound(
        isl=traffic.isl[:count],
        osl=[min(osl, WARM_UP_SAMPLE_OSL) for osl in traffic.osl[:count]],
        concurrency=needed.clients,
    )


def _within(isl: Sequence[int], tokens: int, *, most: int) -> int:
    """Return how many of the first prompts stay within a number of tokens; at least one."""
    return max(int(np.searchsorted(np.cumsum(isl[:most]), tokens, side="right")), 1)


def protocol_of(workload: Mapping[str, Any], arrival_s: Sequence[float]) -> LoadProtocol:
    """Return how a run's `workload` section is sent."""
    if workload["protocol"] == "closed_loop":
        return ClosedLoop(concurrency=int(workload["concurrency"]))
    if workload["protocol"] == "offline":
        return OfflineBurst()
    return OpenLoop(arrival_s=arrival_s)


def _doubling(last: int) -> list[int]:
    """Powers of two up to a number, and the number itself."""
    sizes = [1 << power for power in range(last.bit_length()) if 1 << power < last]
    return [*sizes, last]
