"""The load: more than the GPU serves at all, or than it serves within the SLO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import RATES, Finding, Remedy
from planner.diagnosis.prospect import COMPARED, SimulatedProspect, ratios
from planner.diagnosis.remedies import Knobs, effects, remedies_of, tried
from planner.prediction.predict import Prediction

NEAR_CAPACITY = 0.9
"""Share of the capacity from which arrivals queue."""

SUSTAINABLE = 0.8
"""Share of the capacity that a cure by rate aims at."""

ROOMY_BATCH, ROOMY_TOKENS = 512, 8192
"""Scheduler limits under which a GPU reaches its capacity."""


def over_capacity(case: RunCase) -> Finding | None:
    """Requests arrive faster than the GPU serves them, whatever its scheduler's limits."""
    prospect = case.simulated
    if prospect is None or not prospect.is_open_loop:
        return None
    rate = prospect.rate_per_s
    capacity = max(prospect.capacity_per_s(), prospect.capacity_per_s(**_roomy(prospect)))
    if rate < NEAR_CAPACITY * capacity:
        return None
    servers = prospect.deployment.num_servers
    doubled = prospect.with_knobs(num_servers=2 * servers) or prospect.base
    slower = prospect.at_rate(SUSTAINABLE * capacity)
    # What the scheduler's limits cost is theirs: only what is left with wide ones counts.
    wide = prospect.with_knobs(**_roomy(prospect)) or prospect.base
    halved = prospect.with_knobs(**_roomy(prospect), num_servers=2 * servers) or doubled
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
                knob="num_servers",
                action=f"servers {servers} → {2 * servers}",
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


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "over_capacity": over_capacity,
    "load_beyond_slo": load_beyond_slo,
}


def _faster(prospect: SimulatedProspect) -> Iterator[Knobs]:
    """Yield precisions that take less time, then more GPUs."""
    model, gpu, config = prospect.evaluator.model, prospect.evaluator.gpu, prospect.config
    for name in prospect.rules.legal_values("quantization", model=model, gpu=gpu):
        yield {"quantization": name}
    yield {"kv_cache_dtype": "fp8"}
    yield {"tensor_parallel_size": 2 * config.tensor_parallel_size}
    yield {"num_servers": 2 * prospect.deployment.num_servers}


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
