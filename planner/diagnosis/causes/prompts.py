"""Prompts: those that hold up the tokens of others, and those that are computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import Finding, Remedy
from planner.diagnosis.prospect import SimulatedProspect, ratios
from planner.diagnosis.remedies import Knobs, effects, remedies_of, tried

HOLDS_UP = 0.1
"""Share of decode time in gaps longer than usual from which prompts hold tokens up."""

WORTH_REUSE = 0.1
"""Share of the prompt tokens that are shared from which reuse is missed."""

ALIGNED = 2.0
"""How much likelier than a usual gap a long one must meet a first token."""


def prefill_starves_decode(case: RunCase) -> Finding | None:
    """Long gaps between tokens lie where other requests' prompts are computed."""
    log, prospect = case.log, case.simulated
    if log is None or log.decode_share_of_long_gaps < HOLDS_UP:
        return None
    aligned, chance = log.long_gaps_with_prefill, log.short_gaps_with_prefill
    if aligned < ALIGNED * chance:
        return None
    tail = case.measured.get("itl_ms.p99", 0.0)
    usual = case.measured.get("itl_ms.p50", 0.0)
    found = (
        tried(case, prospect, _smaller_chunks(prospect), metric="itl_ms.p99") if prospect else []
    )
    return Finding(
        cause="prefill_starves_decode",
        words="prompts hold up tokens: steps that compute prompts stretch the gaps of all others",
        evidence=(
            f"gaps of over twice the median take {100 * log.decode_share_of_long_gaps:.0f} % of "
            "all decode time beyond the median",
            f"{100 * aligned:.0f} % of that time another request gets its first token at the end "
            f"of the gap; of other gaps, {100 * chance:.0f} %",
            f"P99 of the gaps {tail:.1f} ms, median {usual:.1f} ms",
        ),
        remedies=remedies_of(found),
        ratios=_without_long_gaps(tail, usual, aligned),
    )


def prefix_reuse_missing(case: RunCase) -> Finding | None:
    """Prompts share a beginning that the engine computes again each time."""
    prospect = case.simulated
    if prospect is None:
        return None
    shared = prospect.demand.shared_prefix_tokens
    tokens = int(prospect.demand.requests.isl.sum())
    hit = case.measured.get("num_prefix_cache_hit_tokens", 0.0) / tokens
    expected = min(shared * len(prospect.demand) / tokens, 1.0) if shared else 0.0
    if expected < WORTH_REUSE or hit > expected / 2:
        return None
    is_off = not prospect.config.enable_block_reuse
    without = prospect.base if is_off else prospect.with_knobs(enable_block_reuse=False)
    reused = prospect.with_knobs(enable_block_reuse=True) if is_off else prospect.base
    if without is None or reused is None:
        return None
    state = "off" if is_off else "on, but finds nothing"
    return Finding(
        cause="prefix_reuse_missing",
        words="prompts begin alike, and each computes its beginning again",
        evidence=(
            f"{shared} tokens are shared: {100 * expected:.0f} % of all prompt tokens; "
            f"{100 * hit:.0f} % came from the cache",
            f"{case.knob('enable_block_reuse')} is {state}",
        ),
        remedies=(
            Remedy(
                knob=case.knob("enable_block_reuse"),
                action=case.turn("enable_block_reuse", False, True)
                if is_off
                else "check that prompts are equal from their first token on, and that blocks "
                "are not evicted in between",
                effects=effects(without, reused),
            ),
        ),
        ratios=ratios(without, reused),
        is_foreseen=is_off,
    )


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "prefill_starves_decode": prefill_starves_decode,
    "prefix_reuse_missing": prefix_reuse_missing,
}


def _smaller_chunks(prospect: SimulatedProspect) -> Iterator[Knobs]:
    config = prospect.config
    chunked = {} if config.enable_chunked_prefill else {"enable_chunked_prefill": True}
    if chunked:
        yield chunked
    for part in (2, 4, 8):
        budget = config.max_num_tokens // part
        if budget >= config.max_batch_size:
            yield {"max_num_tokens": budget, **chunked}


def _without_long_gaps(tail: float, usual: float, aligned: float) -> Mapping[str, float]:
    """Return what is left of the tail without the share of it that meets prompts."""
    if not tail:
        return {}
    return {"itl_ms.p99": 1 - aligned * (1 - usual / tail)}
