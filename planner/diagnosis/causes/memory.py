"""Memory: what did not fit, a KV cache that ran out, one that is smaller than it should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from cost_models.memory import MemoryPlan
from cost_models.units import GIB
from executor.process import OUT_OF_MEMORY
from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import Finding, Remedy
from planner.diagnosis.prospect import Prospect, SimulatedProspect, ratios
from planner.diagnosis.remedies import Knobs, effects, remedies_of, tried
from planner.diagnosis.shortage import Shortage, shortage_in_log

FULL = 0.98
"""Share of the KV blocks in use from which the cache is exhausted."""

SMALLER_POOL = 0.98
"""Measured over predicted KV capacity below which the pool is smaller than it should be."""

MOST_THAT_FIT = 4
"""Remedies of a configuration that does not fit."""


def out_of_memory(case: RunCase) -> Finding | None:
    """The GPU's memory did not suffice: by how many bytes, and what would free them."""
    if not (case.failed and (case.status == "out_of_memory" or OUT_OF_MEMORY.search(case.error))):
        return None
    logged, prospect = shortage_in_log(case.error), case.prospect
    evidence = [logged.words] if logged else ["the log names no size"]
    remedies: list[Remedy] = []
    if prospect is not None:
        evidence.append(_memory_words(prospect.base.memory))
        remedies = list(_what_would_fit(case, prospect, logged))
    return Finding(
        cause="out_of_memory",
        words=f"out of memory: {_short_words(logged, prospect)}",
        evidence=tuple(evidence),
        remedies=tuple(remedies),
        explains_failure=True,
    )


def kv_exhausted(case: RunCase) -> Finding | None:
    """Requests wait for KV blocks, or are thrown out of them and computed again."""
    prospect = case.simulated
    if prospect is None:
        return None
    preempted = case.measured.get("num_preemptions", 0.0)
    used = prospect.simulation.kv_usage().max_fraction
    if used < FULL and not preempted:
        return None
    found = tried(case, prospect, _more_kv(prospect), metric="e2el_ms.mean")
    return Finding(
        cause="kv_exhausted",
        words="the KV cache is full: requests wait for blocks"
        + (", or lose them and are computed again" if preempted else ""),
        evidence=(
            f"{preempted:.0f} preemptions measured, "
            f"{prospect.simulation.requests.preemptions.sum()} predicted",
            f"blocks in use at most {100 * used:.0f} %, predicted",
            _demand_words(case, prospect),
        ),
        remedies=remedies_of(found),
        ratios=ratios(prospect.base, prospect.with_memory()),
    )


def preemptions(case: RunCase) -> Finding | None:
    """Admitting fewer would be faster than throwing requests out."""
    preempted, prospect = case.measured.get("num_preemptions", 0.0), case.simulated
    if not preempted or prospect is None:
        return None
    found = tried(case, prospect, _fewer_admitted(case, prospect), metric="e2el_ms.mean")
    if not found:
        return None
    return Finding(
        cause="preemptions",
        words="more requests are admitted than the KV cache holds to their end",
        evidence=(f"{preempted:.0f} preemptions over {len(prospect.demand)} requests measured",),
        remedies=remedies_of(found),
        ratios=ratios(prospect.base, found[0].prediction),
    )


def smaller_kv_pool(case: RunCase) -> Finding | None:
    """The engine's KV cache is smaller than its memory allows: something else holds the rest."""
    prospect, measured = case.simulated, case.measured.get("kv_cache_tokens", 0.0)
    if prospect is None or not measured:
        return None
    expected = prospect.base.value("kv_cache_tokens")
    if measured >= SMALLER_POOL * expected:
        return None
    held = prospect.with_knobs(kv_cache_max_tokens=int(measured))
    missing = (expected - measured) * prospect.base.memory.layout.bytes_per_token
    return Finding(
        cause="smaller_kv_pool",
        words="the KV cache is smaller than predicted: other programs or buffers hold memory",
        evidence=(
            f"{measured:,.0f} tokens, predicted {expected:,.0f}: "
            f"{missing / GIB:.2f} GiB are elsewhere",
        ),
        remedies=(
            Remedy(
                knob="",
                action="free the GPU of other processes",
                effects=effects(held, prospect.base) if held else (),
            ),
        ),
        ratios=ratios(held, prospect.base) if held else {},
        is_foreseen=False,
    )


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "out_of_memory": out_of_memory,
    "kv_exhausted": kv_exhausted,
    "preemptions": preemptions,
    "smaller_kv_pool": smaller_kv_pool,
}


def _short_words(logged: Shortage | None, prospect: Prospect | None) -> str:
    if logged is not None:
        return f"{logged.short_bytes:,.0f} bytes ({logged.short_bytes / GIB:.2f} GiB) short"
    if prospect is None:
        return "by how much is not known"
    short = float(prospect.base.memory.shortfall_bytes)
    if short > 0:
        return f"{short:,.0f} bytes ({short / GIB:.2f} GiB) short, by the memory model"
    return "the memory model says that it fits, so another process holds memory or the peak differs"


def _memory_words(memory: MemoryPlan) -> str:
    parts = (
        ("weights", memory.weight_bytes_per_gpu),
        ("KV cache", memory.kv_cache_bytes_per_gpu),
        ("activations", memory.activation_bytes_per_gpu),
        ("runtime", memory.runtime_bytes_per_gpu),
        ("CUDA graphs", memory.cuda_graph_bytes_per_gpu),
    )
    listed = ", ".join(f"{name} {float(size) / GIB:.2f}" for name, size in parts)
    total, short = float(memory.total_bytes), float(memory.shortfall_bytes)
    end = (
        f"{short / GIB:.2f} GiB short ({memory.binding})"
        if short
        else (f"{float(memory.free_bytes_per_gpu) / GIB:.2f} GiB free")
    )
    return f"the memory model, in GiB of {total / GIB:.2f}: {listed}; {end}"


def _what_would_fit(case: RunCase, prospect: Prospect, logged: Shortage | None) -> Iterator[Remedy]:
    """Yield the changes after which the memory suffices: of each set of knobs the gentlest."""
    before, done = prospect.base.memory, set[tuple[str, ...]]()
    needed = max(logged.short_bytes if logged else 0.0, float(before.shortfall_bytes))
    if logged is not None and logged.is_another_process:
        yield _less_than_is_free(case, prospect, logged)
        return
    for knobs in _smaller(prospect, logged):
        after = prospect.memory_with(**knobs)
        if after is None or not after.fits or tuple(knobs) in done or len(done) == MOST_THAT_FIT:
            continue
        note = _enough(before, after, needed, logged)
        if not note:
            continue
        done.add(tuple(knobs))
        turned = [case.turn(n, getattr(prospect.config, n), knobs[n]) for n in knobs]
        fitted = case.simulated.with_knobs(**knobs) if case.simulated else None
        yield Remedy(
            knob=case.knob(next(iter(knobs))),
            action=", ".join(turned),
            effects=effects(prospect.base, fitted) if fitted else (),
            note=note,
        )


def _enough(before: MemoryPlan, after: MemoryPlan, needed: float, logged: Shortage | None) -> str:
    """Say what a change gives, or nothing where that is not enough; bytes."""
    if logged is not None and logged.of_kv_cache:
        sequence = before.layout.bytes_per_token / after.layout.bytes_per_token
        there = logged.there_bytes + float(
            after.kv_cache_bytes_per_gpu - before.kv_cache_bytes_per_gpu
        )
        held = there * sequence
        if after.max_sequences > before.max_sequences and held < logged.needed_bytes:
            return "a shorter longest sequence takes less"
        if held < logged.needed_bytes:
            return ""
        return f"room for {held / logged.needed_bytes:.1f} sequences of max_seq_len"
    freed = _used(before) - _used(after)
    if freed < needed:
        return ""
    return f"frees {freed / GIB:.2f} GiB, {needed / GIB:.2f} GiB are needed"


def _less_than_is_free(case: RunCase, prospect: Prospect, logged: Shortage) -> Remedy:
    """Return the share of the memory that leaves the other process its own."""
    fraction = _fraction_knob(prospect)
    share = getattr(prospect.config, fraction)
    lower = math.floor(100 * share * logged.there_bytes / logged.needed_bytes) / 100
    return Remedy(
        knob=case.knob(fraction),
        action=f"end the other process, or {case.turn(fraction, share, lower)}",
        note=f"{logged.there_bytes / GIB:.2f} GiB are free",
    )


def _smaller(prospect: Prospect, logged: Shortage | None) -> Iterator[Knobs]:
    """Yield what takes less memory, or leaves more to the KV cache; the gentlest first."""
    config, fraction = prospect.config, _fraction_knob(prospect)
    share = getattr(config, fraction)
    if logged is not None and logged.of_kv_cache:
        yield {fraction: min(share + 0.05, 0.98)}
        fitting = config.max_seq_len * logged.there_bytes / logged.needed_bytes
        yield {"max_seq_len": int(fitting) // 64 * 64}
    else:
        yield from ({fraction: share - step} for step in (0.05, 0.1, 0.2) if share > step + 0.1)
    yield {"kv_cache_dtype": "fp8"}
    yield from ({"max_num_tokens": config.max_num_tokens // part} for part in (2, 4))
    yield from ({"max_batch_size": max(config.max_batch_size // part, 1)} for part in (2, 4))
    yield {"cuda_graph_max_batch_size": config.cuda_graph_max_batch_size // 2}
    yield from ({"quantization": name} for name in _narrower(prospect))
    for factor in (2, 4, 8):
        more = {"tensor_parallel_size": factor * config.tensor_parallel_size}
        yield from ({"quantization": name, **more} for name in _narrower(prospect)[:1])
        yield more


def _narrower(prospect: Prospect) -> tuple[str, ...]:
    """Return the quantizations of fewer bits that the engine runs on this GPU."""
    model, gpu = prospect.evaluator.model, prospect.evaluator.gpu
    names = prospect.rules.legal_values("quantization", model=model, gpu=gpu)
    return tuple(n for n in names if n not in (prospect.config.quantization, "bf16", "fp16"))


def _used(memory: MemoryPlan) -> float:
    return float(memory.total_bytes - memory.free_bytes_per_gpu + memory.shortfall_bytes)


def _fraction_knob(prospect: Prospect) -> str:
    return prospect.evaluator.calibration.traits.memory_knob


def _more_kv(prospect: Prospect) -> Iterator[Knobs]:
    config, fraction = prospect.config, _fraction_knob(prospect)
    if config.kv_cache_max_tokens:
        yield {"kv_cache_max_tokens": 0}
        yield {"kv_cache_max_tokens": 2 * config.kv_cache_max_tokens}
    elif getattr(config, fraction) < 0.95:
        yield {fraction: 0.95}
    if config.kv_cache_dtype in ("bf16", "fp16"):
        yield {"kv_cache_dtype": "fp8"}
    if config.capacity_scheduler_policy == "GUARANTEED_NO_EVICT":
        yield {"capacity_scheduler_policy": "MAX_UTILIZATION"}
    yield {"tensor_parallel_size": 2 * config.tensor_parallel_size}


def _fewer_admitted(case: RunCase, prospect: SimulatedProspect) -> Iterator[Knobs]:
    """Yield what keeps requests out that the cache does not hold."""
    decoding = case.log.most_decoding if case.log else prospect.config.max_batch_size
    for share in (0.9, 0.75, 0.5):
        yield {"max_batch_size": max(int(share * decoding), 1)}
    if prospect.config.capacity_scheduler_policy == "MAX_UTILIZATION":
        yield {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}


def _demand_words(case: RunCase, prospect: SimulatedProspect) -> str:
    """Say what the requests that want to run together hold, beside what there is."""
    requests = prospect.demand.requests
    held = float(np.mean(requests.isl + requests.osl / 2))
    there = case.measured.get("kv_cache_tokens") or prospect.base.value("kv_cache_tokens")
    clients = prospect.demand.concurrency
    together = f", {clients} clients together {clients * held:,.0f}" if clients else ""
    return f"the cache holds {there:,.0f} tokens; a request {held:,.0f} on average{together}"
