"""How a run ended, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from executor.backend import Failure, Server, ServerFailedError
from executor.drive import Driven, failure_message, verdict
from executor.records import MeasuredRequest, measured_section
from executor.traffic import Traffic
from executor.window import longest_stall_s, steady_section

CACHED_FRACTION = 0.02
"""Share of the prompt tokens that may come from a prefix cache by chance and block rounding."""


MASKING_KEY = "allowed_token_ids"
"""Key of a request that restricts its tokens: vLLM keeps a mask over the whole vocabulary for it on
the CPU, and renews it whenever a request joins or leaves the batch
(`python -m tests.bench.speculation_steps`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one run ended, and what it measured."""

    status: str = "ok"
    error: str = ""
    requests: tuple[MeasuredRequest, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    notes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def raise_if_broken(driven: Driven, server: Server) -> None:
    """Raise what a warm-up met: all but its own time limit, and single wrong requests."""
    if driven.interrupted:
        raise KeyboardInterrupt
    status, error = verdict(driven, server)
    if status not in ("ok", Failure.OUT_OF_TIME, Failure.WRONG_LENGTH):
        raise ServerFailedError(f"warm-up: {error}", kind=Failure(status))


def outcome_of(
    driven: Driven,
    server: Server,
    *,
    counted: Mapping[str, float],
    telemetry: Mapping[str, Any],
    cached: bool,
) -> Outcome:
    """Return how a load ended and what it measured, with what a reader must know of it."""
    result = driven.result
    status, error = verdict(driven, server)
    stall_s = longest_stall_s(result.requests)
    measured = {
        **measured_section(result.requests),
        **server.facts(),
        **counted,
        "steady": steady_section(result.requests),
        "longest_stall_ms": round(stall_s * 1e3, 1),
    }
    reasons = {
        "client_limited": result.lag.limits_the_run,
        "stalled": stall_s > 0,
        "cached_prompts": cached,
        "approximate_lengths": not server.endpoint.exact_lengths,
        "token_mask": MASKING_KEY in server.endpoint.options,
    }
    return Outcome(
        status=status,
        error=error,
        requests=result.requests,
        measured=measured,
        client=result.lag.to_json(),
        telemetry=telemetry,
        command=server.command,
        notes=server.notes,
        flags=tuple(name for name, holds in reasons.items() if holds),
    )


def was_cached(counted: Mapping[str, float], traffic: Traffic) -> bool:
    """Whether the engine had prompts in its cache beyond the prefix that they share."""
    found = counted.get("num_prefix_cache_hit_tokens", 0.0)
    shared = traffic.shared_prefix_tokens * len(traffic.isl)
    return found - shared > CACHED_FRACTION * sum(traffic.isl)


def failed(error: ServerFailedError) -> Outcome:
    """Return the outcome of a run that an engine has failed."""
    return Outcome(status=error.kind, error=failure_message(error), command=error.command)
