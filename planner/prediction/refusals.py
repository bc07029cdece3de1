"""Requests that an engine turns away: how many, by which limit, and what would take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.simulator import Refusal, SimulationResult
from planner.simulator.results import RequestColumns

LIMITS: Mapping[Refusal, str] = {
    Refusal.MAX_SEQ_LEN: "max_seq_len",
    Refusal.MAX_NUM_TOKENS: "max_num_tokens",
    Refusal.KV_CACHE: "KV cache",
}
"""What turns requests away, by the name of the knob or of the resource."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Requests that one limit turns away."""

    limit: str
    """A knob's name, or `KV cache`."""
    share: float
    """Of all requests."""
    accepted_from: int
    """Tokens of the limit at which all of them would be taken."""

    def __str__(self) -> str:
        """Return one line with the way out."""
        tokens = f"{self.accepted_from:,} tokens"
        way_out = {
            "max_num_tokens": f"enable_chunked_prefill, or max_num_tokens of {tokens},",
            "KV cache": f"room for {tokens} of one sequence",
        }.get(self.limit, f"{self.limit} of {tokens}")
        share = f"{100 * self.share:.3g} % of the requests"
        return f"{self.limit} refuses {share}; {way_out} would take them"

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "limit": self.limit,
            "share": round(self.share, 6),
            "accepted_from": self.accepted_from,
        }


def refusals_of(simulation: SimulationResult) -> tuple[Refused, ...]:
    """Return what was refused in a simulated run, the commonest first."""
    found, requests = [], simulation.requests
    for refusal, limit in LIMITS.items():
        rows = requests.refusal == refusal
        if rows.any():
            found.append(
                Refused(
                    limit=limit,
                    share=float(rows.mean()),
                    accepted_from=_accepted_from(refusal, requests, rows),
                )
            )
    return tuple(sorted(found, key=lambda one: -one.share))


def _accepted_from(refusal: Refusal, requests: RequestColumns, rows: NDArray[np.bool_]) -> int:
    prompt = requests.isl[rows]
    if refusal is Refusal.MAX_NUM_TOKENS:
        return int(prompt.max())
    return int((prompt + requests.max_tokens[rows]).max())
