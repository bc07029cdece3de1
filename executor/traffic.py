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


def warm_up_rounds(
    traffic: Traffic, *, max_batch_size: int, max_num_tokens: int
) -> Iterator[WarmUpRound]:
    """Yield what makes an engine compile and tune every kind of step that the traffic needs.

    Prompts alone by length, batches of decoding sequences by size, then a mix of both.
    """
    longest = max(traffic.isl)
    lengths = [n for n in _doubling(longest) if n <= max(max_num_tokens, longest)]
    yield WarmUpRound(isl=lengths, osl=[2] * len(lengths), concurrency=1)
    clients = min(traffic.most_clients, max_batch_size, MOST_WARM_UP_CLIENTS)
    short = min(longest, 32)
    for size in _doubling(clients):
        yield WarmUpRound(isl=[short] * size, osl=[WARM_UP_OSL] * size, concurrency=size)
    count = min(2 * clients, len(traffic.isl))
    yield WarmUpRound(
        isl=traffic.isl[:count],
        osl=[min(osl, WARM_UP_SAMPLE_OSL) for osl in traffic.osl[:count]],
        concurrency=clients,
    )


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
