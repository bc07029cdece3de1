"""What a deployment is asked to serve, reduced to what the closed form reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from numpy.typing import ArrayLike

from cost_models.acceptance import Acceptance
from cost_models.metrics import PERCENTILES


class ArrivalMode(StrEnum):
    """How requests come."""

    CLOSED_LOOP = "closed_loop"
    """N clients, each sends its next request when the last one ends; all start together."""
    OPEN_LOOP = "open_loop"
    """Requests arrive on their own clock."""
    OFFLINE = "offline"
    """Everything is queued at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Moments and percentiles of a length in tokens."""

    mean: float
    cv: float
    """Standard deviation over mean."""
    quantiles: Mapping[str, float]
    """By name: `p50`, `p90`, `p95`, `p99`."""
    maximum: float

    @classmethod
    def fixed(cls, tokens: float) -> Lengths:
        """Return the distribution of a constant length."""
        return cls(
            mean=tokens, cv=0.0, quantiles=dict.fromkeys(PERCENTILES, tokens), maximum=tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of a whole deployment."""

    protocol: ArrivalMode
    isl: Lengths
    osl: Lengths
    concurrency: float = 0.0
    """Clients of a closed loop."""
    rate_per_s: ArrayLike = 0.0
    """Arrivals of an open loop; an array asks for several rates at once."""
    arrival_cv: float = 1.0
    """Standard deviation over mean of the time between arrivals; 1 is Poisson."""
    num_requests: float = 0.0
    """Requests of a run with an end; 0 is a service without one."""
    reusable_prefix_tokens: float = 0.0
    """Mean prompt tokens that block reuse finds in the cache."""
    max_output_tokens: float = 0.0
    """What clients allow; an engine that reserves memory to completion reserves this."""
    acceptances: Mapping[str, Acceptance] = field(default_factory=dict)
    """How often drafts of its text are right, by decoding type, as far as that is known."""

    @property
    def is_lockstep(self) -> bool:
        """Whether clients that start together end together: a closed loop of equal requests."""
        equal = self.isl.cv == 0 and self.osl.cv == 0
        return self.protocol is ArrivalMode.CLOSED_LOOP and equal
