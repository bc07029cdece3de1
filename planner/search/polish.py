"""The last steps of the search in closed form: no neighbour beats the result, no knob is odd.

`polished` climbs from a candidate, one knob at a time, so that what the search leaves to chance
does not show. `simplified` gives back what buys nothing: where a knob makes no difference, the
engine's default or the rounder number stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cost_models.deployment import Deployment
from planner.prediction.evaluator import Evaluator, Slice
from planner.search.space import SearchSpace
from planner.search.study import Candidate, evaluated

LEAST_GAIN = 0.002
"""Of the objective; less is no gain."""

MOST_ROUNDS = 4
"""Rounds over all knobs; each must gain."""

POLISHED_KNOBS = (
    "max_batch_size",
    "max_num_tokens",
    "enable_chunked_prefill",
    "tokens_per_block",
    "free_gpu_memory_fraction",
    "capacity_scheduler_policy",
    "stream_interval",
    "tensor_parallel_size",
    "pipeline_parallel_size",
)

SIMPLIFIED_KNOBS = (
    "stream_interval",
    "capacity_scheduler_policy",
    "free_gpu_memory_fraction",
    "tokens_per_block",
    "enable_chunked_prefill",
    "max_num_tokens",
    "max_batch_size",
    "pipeline_parallel_size",
)


def settled(
    candidate: Candidate, space: SearchSpace, evaluator: Evaluator, *, objective: str
) -> Candidate:
    """Return a candidate that no change of one knob betters, its knobs as plain as can be."""
    best = polished(candidate, space, evaluator, objective=objective)
    deployment = simplified(best.deployment, space, evaluator)
    return evaluated(
        deployment, evaluator, objective=objective, prefers_fewer_gpus=not space.use_all
    )


def polished(
    candidate: Candidate, space: SearchSpace, evaluator: Evaluator, *, objective: str
) -> Candidate:
    """Return a candidate that no change of one knob betters in closed form.

    Args:
        candidate: Where the climb begins.
        space: What may be chosen.
        evaluator: Model, GPU, calibration, load and SLO.
        objective: What is maximised.
    """
    best = candidate
    for _ in range(MOST_ROUNDS):
        before = best
        for knob in POLISHED_KNOBS:
            for value in space.choices(knob):
                changed = space.legal(best.deployment, **{knob: value})
                if changed is not None and changed != best.deployment:
                    other = _with_best_count(changed, space, evaluator, objective)
                    best = other if other is not None and _is_better(other, best) else best
        if best is before:
            break
    return best


def _with_best_count(
    deployment: Deployment, space: SearchSpace, evaluator: Evaluator, objective: str
) -> Candidate | None:
    counts = space.server_counts(deployment.config)
    found = [
        evaluated(
            deployment.with_knobs(num_servers=count),
            evaluator,
            objective=objective,
            prefers_fewer_gpus=not space.use_all,
        )
        for count in (counts if deployment.num_servers not in counts else (deployment.num_servers,))
    ]
    return max(found, key=lambda one: one.rank, default=None)


def _is_better(one: Candidate, other: Candidate) -> bool:
    if one.rank[:2] != other.rank[:2]:
        return one.rank > other.rank
    return one.score > other.score + LEAST_GAIN * abs(other.score)


def simplified(deployment: Deployment, space: SearchSpace, evaluator: Evaluator) -> Deployment:
    """Return a deployment that is worth as much, with fewer knobs away from the default.

    Args:
        deployment: What was found.
        space: What may be chosen; its base holds the engine's defaults.
        evaluator: Model, GPU, calibration, load and SLO.
    """
    known = _Worth(evaluator, deployment)
    for knob in SIMPLIFIED_KNOBS:
        for value in _plainer(space, deployment, knob):
            changed = space.legal(deployment, **{knob: value})
            if changed is not None and known.is_kept_by(changed):
                deployment = changed
                break
    return deployment


def _plainer(space: SearchSpace, deployment: Deployment, knob: str) -> Iterator[Any]:
    """Yield what would be plainer than the present value of a knob, the plainest first.

    That is the default, then rounder numbers. A batch limit is plainer the smaller it is: each
    batch up to it is captured in a CUDA graph when the engine starts.
    """
    present, default = deployment.knob(knob), space.base.knob(knob)
    choices = space.choices(knob)
    if knob == "max_batch_size":
        yield from (size for size in choices if size < present and not size & (size - 1))
    elif present != default:
        if default in choices:
            yield default
        if isinstance(present, int) and present & (present - 1):
            powers = [value for value in choices if not value & (value - 1)]
            yield from sorted(powers, key=lambda value: abs(value - present))[:2]


class _Worth:
    """What a deployment is worth in closed form, in every respect that a reader looks at."""

    LATENCIES = ("ttft_ms.p99", "tpot_ms.mean", "itl_ms.p99")

    def __init__(self, evaluator: Evaluator, deployment: Deployment) -> None:
        self.evaluator = evaluator
        self.values = self._of(deployment)

    def is_kept_by(self, deployment: Deployment) -> bool:
        """Whether another deployment is worth no less in any respect."""
        return all(
            now >= before - LEAST_GAIN * abs(before)
            for now, before in zip(self._of(deployment), self.values, strict=True)
        )

    def _of(self, deployment: Deployment) -> tuple[float, ...]:
        found = self.evaluator.evaluate(Slice(base=deployment))
        return (
            float(found.highest_rate_per_s[0]),
            float(found.memory.kv_cache_tokens[0]),
            -float(found.refused_share[0]),
            -float(found.memory.shortfall_bytes[0]),
            *(-float(found.metrics[name][0]) for name in self.LATENCIES),
            *(-max(float(excess[0]), 0.0) for excess in found.slo_excess.values()),
        )
