"""Batching: limits that bind, prompts that hold up tokens, queues, prefixes computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import RATES, Finding, Remedy
from planner.diagnosis.prospect import COMPARED, SimulatedProspect, ratios
from planner.diagnosis.remedies import Knobs, effects, remedies_of, tried
from planner.prediction.predict import Prediction

REACHED = 0.95
"""Share of a limit from which it is reached."""

OFTEN = 0.05
"""Share of the steps from which a limit is reached often."""

HOLDS_UP = 0.1
"""Share of decode time in gaps longer than usual from which prompts hold tokens up."""

ALIGNED = 2.0
"""How much likelier than a usual gap a long one must meet a first token."""

NEAR_CAPACITY = 0.9
"""Share of the capacity from which arrivals queue."""

UNQUEUED = 0.05
"""Quantile of the waits for a first token that stands for no wait at all."""

SUSTAINABLE = 0.8
"""Share of the capacity that a cure by rate aims at."""

ROOMY_BATCH, ROOMY_TOKENS = 512, 8192
"""Scheduler limits under which a GPU reaches its capacity."""


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


def over_capacity(case: RunCase) -> Finding | None:
    """Requests arrive faster than the GPU serves them, whatever its scheduler's limits."""
    prospect = case.simulated
    if prospect is None or not prospect.is_open_loop:
        return None
    rate = prospect.rate_per_s
    capacity = max(prospect.capacity_per_s(), prospect.capacity_per_s(**_roomy(prospect)))
    if rate < NEAR_CAPACITY * capacity:
        return None
    replicas = prospect.config.num_replicas
    doubled = prospect.with_knobs(num_replicas=2 * replicas) or prospect.base
    slower = prospect.at_rate(SUSTAINABLE * capacity)
    # What the scheduler's limits cost is theirs: only what is left with wide ones counts.
    wide = prospect.with_knobs(**_roomy(prospect)) or prospect.base
    halved = prospect.with_knobs(**_roomy(prospect), num_replicas=2 * replicas) or doubled
    return Finding(
        cause="over_capacity",
        words="more arrives than the GPU can serve: a queue grows as long as that lasts"
        if rate > capacity
        else "arrivals come near to what the GPU can serve: each burst queues for long",
        evidence=(
            f"{rate:.3g} requests/s arrive, {capacity:.3g}/s is what this GPU serves at most "
            "with wide scheduler limits (predicted)",
            f"{case.measured.get('request_per_s', 0.0):.3g} requests/s were served",
        ),
        remedies=(
            Remedy(
                knob="replicas",
                action=f"replicas {replicas} → {2 * replicas}",
                effects=effects(prospect.base, doubled),
            ),
            Remedy(
                knob="",
                action=f"admit {SUSTAINABLE * capacity:.3g} requests/s",
                effects=effects(prospect.base, slower),
            ),
        ),
        ratios=_left_of(prospect.base, wide, halved),
    )


def load_beyond_slo(case: RunCase) -> Finding | None:
    """Requests share the GPU with too many others to keep the limits that were asked for."""
    prospect = case.simulated
    over = {m: case.measured[m] / limit for m, limit in case.slo.items() if m in case.measured}
    if prospect is None or not over or max(over.values()) <= 1:
        return None
    worst = max(over, key=lambda metric: over[metric])
    alone = prospect.nearly_alone()
    best = alone.value(worst)
    can_hold = "so load is what breaks it" if best <= case.slo[worst] else "over the limit too"
    found = tried(case, prospect, _faster(prospect), metric=worst)
    return Finding(
        cause="load_beyond_slo",
        words="the load is more than this configuration serves within the SLO",
        evidence=(
            f"{worst} is {over[worst]:.2f} times its limit; with hardly any other request it "
            f"would be {best:.4g} (predicted), {can_hold}",
        ),
        remedies=(*remedies_of(found), *_half_the_load(prospect)),
        ratios=ratios(prospect.base, alone),
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
    if expected < HOLDS_UP or hit > expected / 2:
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
    "max_batch_size": max_batch_size,
    "max_num_tokens": max_num_tokens,
    "refused_prompts": refused_prompts,
    "prefill_starves_decode": prefill_starves_decode,
    "over_capacity": over_capacity,
    "load_beyond_slo": load_beyond_slo,
    "prefix_reuse_missing": prefix_reuse_missing,
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


def _faster(prospect: SimulatedProspect) -> Iterator[Knobs]:
    """Yield precisions that take less time, then more GPUs."""
    model, gpu, config = prospect.evaluator.model, prospect.evaluator.gpu, prospect.config
    for name in prospect.rules.legal_values("quantization", model=model, gpu=gpu):
        yield {"quantization": name}
    yield {"kv_cache_dtype": "fp8"}
    yield {"tensor_parallel_size": 2 * config.tensor_parallel_size}
    yield {"num_replicas": 2 * config.num_replicas}


def _half_the_load(prospect: SimulatedProspect) -> tuple[Remedy, ...]:
    clients = prospect.demand.concurrency
    if prospect.is_open_loop:
        rate = prospect.rate_per_s / 2
        halved, words = prospect.at_rate(rate), f"admit {rate:.3g} requests/s"
    elif clients > 1:
        halved, words = prospect.with_clients(clients // 2), f"admit {clients // 2} at once"
    else:
        return ()
    return (Remedy(knob="", action=words, effects=effects(prospect.base, halved)),)


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


def _left_of(base: Prediction, before: Prediction, after: Prediction) -> Mapping[str, float]:
    """Return what is left of each time when it loses what a step between two others takes."""
    times = [name for name in COMPARED if name not in RATES and base.value(name) > 0]
    return {n: 1 - max(before.value(n) - after.value(n), 0.0) / base.value(n) for n in times}


def _roomy(prospect: SimulatedProspect) -> Knobs:
    """Return scheduler limits that keep nothing waiting but for the GPU."""
    config = prospect.config
    return {
        "max_batch_size": max(config.max_batch_size, ROOMY_BATCH),
        "max_num_tokens": max(config.max_num_tokens, ROOMY_TOKENS),
    }
