"""A workload under another load: distributions are stretched to a new mean, their shape stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cost_models.errors import ConfigError
from planner.workloads.model import LARGEST_TOKENS, LengthDistribution, RequestTrace, Workload


def changed_workload(
    workload: Workload,
    *,
    rate_per_s: float | None = None,
    isl: float | None = None,
    osl: float | None = None,
) -> Workload:
    """Return a workload with another rate (requests/s) or mean lengths (tokens); None keeps.

    Raises:
        ConfigError: A value that no load can have, or a rate where clients set the pace.
    """
    if rate_per_s is not None:
        workload = _with_rate(workload, rate_per_s)
    if isl is not None:
        workload = _with_lengths(workload, "isl", isl)
    if osl is not None:
        workload = _with_lengths(workload, "osl", osl)
    return workload


def _with_rate(workload: Workload, rate_per_s: float) -> Workload:
    if not 0 < rate_per_s <= 1e6:
        raise ConfigError(f"rate {rate_per_s:g} requests/s", hint="accepted: above 0 to 1000000")
    if not workload.arrival.rate_per_s:
        raise ConfigError(
            f"{workload.name} is {workload.arrival.process}: its clients set the rate",
            hint="leave it empty",
        )
    faster = rate_per_s / workload.arrival.rate_per_s
    trace = workload.trace
    return replace(
        workload,
        arrival=replace(workload.arrival, rate_per_s=rate_per_s),
        trace=replace(trace, arrival_s=trace.arrival_s / faster) if trace else None,
    )


def _with_lengths(workload: Workload, name: str, mean: float) -> Workload:
    """Stretch prompts or outputs to a new mean; the shape of the distribution stays."""
    if not 1 <= mean <= LARGEST_TOKENS:
        raise ConfigError(
            f"{name.upper()} {mean:g} tokens", hint=f"accepted: 1 to {LARGEST_TOKENS}"
        )
    distribution: LengthDistribution = getattr(workload, name)
    factor = mean / distribution.lengths().mean
    tokens = np.clip(distribution.tokens * factor, 1, LARGEST_TOKENS)
    changed: dict[str, Any] = {name: replace(distribution, tokens=tokens)}
    if name == "osl":
        longest = max(round(workload.max_output_tokens * factor), 1)
        changed["max_output_tokens"] = min(longest, LARGEST_TOKENS)
    if workload.trace:
        changed["trace"] = _stretched(workload.trace, name, factor)
    return replace(workload, **changed)


def _stretched(trace: RequestTrace, name: str, factor: float) -> RequestTrace:
    lengths = np.clip(np.rint(getattr(trace, name) * factor), 1, LARGEST_TOKENS)
    return replace(trace, **{name: lengths.astype(np.int64)})
