"""The limits of a step: a batch or a token budget that keeps requests waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import Finding, Remedy
from planner.diagnosis.prospect import SimulatedProspect, ratios
from planner.diagnosis.remedies import Knobs, remedies_of, tried

REACHED = 0.95
"""Share of a limit from which it is reached."""

OFTEN = 0.05
"""Share of the steps from which a limit is reached often."""

UNQUEUED = 0.05
"""Quantile of the waits for a first token that stands for no wait at all."""


def max_batch_size(case: RunCase) -> Finding | None:
    """The batch limit keeps requests waiting that the GPU could serve."""
    prospect = case.simulated
    if prospect is None:
        return _full_batch_by_log(case)
    limit, most = prospect.config.max_batch_size, _most_running(case, prospect)
    if most < REACHED * limit or not _waits(prospect):
        return None
    wider = [{"max_batch_size": limit * factor} for factor in (2, 4, 8, 16)]
    waited = case.measured.get("ttft_ms.mean", prospect.base.value("ttft_ms.mean"))
    return _limit_finding(
        case,
        prospect,
        wider,
        cause="max_batch_size",
        words="max_batch_size binds: requests wait for a place in the batch",
        evidence=(
            f"at most {most} requests ran at once, {case.knob('max_batch_size')} is {limit}",
            f"a request waits {waited:,.0f} ms for its first token on average, "
            f"{_queue_ms(prospect):,.0f} ms of it for a place (predicted)",
        ),
    )


def max_num_tokens(case: RunCase) -> Finding | None:
    """The token budget of a step keeps prompts waiting."""
    prospect = case.simulated
    if prospect is None:
        return None
    limit, full = prospect.config.max_num_tokens, _full_steps(prospect)
    if full < OFTEN:
        return None
    return _limit_finding(
        case,
        prospect,
        [{"max_num_tokens": limit * factor} for factor in (2, 4)],
        cause="max_num_tokens",
        words="max_num_tokens binds: prompts wait for room in a step",
        evidence=(
            f"{100 * full:.0f} % of the steps with prompts are full at "
            f"{case.knob('max_num_tokens')} {limit} (predicted)",
        ),
    )


def refused_prompts(case: RunCase) -> Finding | None:
    """Prompts that no step can take, where they are not chunked."""
    prospect = case.simulated
    if prospect is None or not prospect.base.refused_share:
        return None
    found = tried(
        case,
        prospect,
        [
            {"enable_chunked_prefill": True},
            {"max_num_tokens": 2 * prospect.config.max_num_tokens},
            {"max_num_tokens": 4 * prospect.config.max_num_tokens},
        ],
        metric="request_per_s",
    )
    return Finding(
        cause="refused_prompts",
        words="prompts longer than max_num_tokens are refused without chunked prefill",
        evidence=(
            f"{100 * prospect.base.refused_share:.1f} % of the prompts are longer than "
            f"{prospect.config.max_num_tokens} tokens",
        ),
        remedies=remedies_of(found),
        explains_failure=case.failed,
    )


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "max_batch_size": max_batch_size,
    "max_num_tokens": max_num_tokens,
    "refused_prompts": refused_prompts,
}


def _full_batch_by_log(case: RunCase) -> Finding | None:
    """The same for an engine without a model: who did not wait shows what waiting costs."""
    limit, log = int(case.run.config.get("max_batch_size") or 0), case.log
    if log is None or not limit or log.most_decoding < REACHED * limit:
        return None
    waits_s = (log.first_token_s - log.arrival_s)[log.served]
    unqueued_s, mean_s = float(np.quantile(waits_s, UNQUEUED)), float(waits_s.mean())
    whole_s = float((log.last_token_s - log.arrival_s)[log.served].mean())
    return Finding(
        cause="max_batch_size",
        words="max_batch_size binds: requests wait for a place in the batch",
        evidence=(
            f"at most {log.most_decoding} requests ran at once, max_batch_size is {limit}",
            f"the first token takes {1e3 * mean_s:,.0f} ms on average, {1e3 * unqueued_s:,.0f} ms "
            "for those that hardly waited",
        ),
        remedies=(
            Remedy(
                knob=case.knob("max_batch_size"),
                action=case.turn("max_batch_size", limit, 4 * limit),
                note=f"not predicted: {case.not_predicted}",
            ),
        ),
        ratios={
            "ttft_ms.mean": unqueued_s / mean_s,
            "e2el_ms.mean": 1 - (mean_s - unqueued_s) / whole_s,
        },
    )


def _limit_finding(
    case: RunCase,
    prospect: SimulatedProspect,
    wider: Sequence[Knobs],
    *,
    cause: str,
    words: str,
    evidence: tuple[str, ...],
) -> Finding | None:
    """Return the finding of a limit that binds, or None where a wider one gains nothing."""
    found = tried(case, prospect, wider, metric="e2el_ms.mean")
    if not found:
        return None
    return Finding(
        cause=cause,
        words=words,
        evidence=evidence,
        remedies=remedies_of(found),
        ratios=ratios(prospect.base, found[0].prediction),
    )


def _most_running(case: RunCase, prospect: SimulatedProspect) -> int:
    if case.log is not None:
        return case.log.most_decoding
    return max(int(log.decoding.max(initial=0)) for log in prospect.logs)


def _waits(prospect: SimulatedProspect) -> bool:
    """Whether requests are queued in the simulation."""
    return any(log.waiting.any() for log in prospect.logs)


def _queue_ms(prospect: SimulatedProspect) -> float:
    return 1e3 * float(prospect.simulation.queue_s.mean())


def _full_steps(prospect: SimulatedProspect) -> float:
    """Return which share of the steps with prompts takes all the tokens that a step may."""
    logs = prospect.logs
    tokens = np.concatenate([log.prompt_tokens + log.decoding for log in logs])
    prefills = np.concatenate([log.prompts for log in logs]) > 0
    if not prefills.any():
        return 0.0
    return float(np.mean(tokens[prefills] >= REACHED * prospect.config.max_num_tokens))
