"""The configurations among which a tuning chooses, and what is predicted of each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.engine import EngineConfig
from cost_models.metrics import RequestTimes, goodput_per_s
from engines.registry import defaults_of
from planner.prediction.intervals import NORMAL_Q95
from planner.prediction.predict import Prediction, predict_deployment
from planner.prediction.simulation import request_limits
from planner.question import PlanRequest, Problem, search_space
from planner.search.objective import DECIDING
from planner.search.space import SearchSpace
from planner.search.study import SearchOptions, search
from planner.tuning.belief import Belief
from planner.workloads.demand import Demand

FloatArray = NDArray[np.float64]

SEARCH_S = 600.0
"""Longest search; ample, so that slow hosts and fast ones find the same candidates."""

POOL_SIZE = 24

NUM_BEST = 12
"""Candidates that the search ranks best; the others are the first with one knob changed."""

PER_KIND = 16
"""Candidates of the same precision and split."""

VARIED_KNOBS = (
    "tokens_per_block", "max_num_tokens", "max_batch_size", "kv_cache_dtype",
    "enable_chunked_prefill",
)  # fmt: skip

SMALLEST_SCORE = 1e-6
"""Of what serves nothing within the SLO: logarithms need a number."""

EXCESS_PENALTY = 3.0
"""Log score lost for each 100 % by which the worst limit is missed."""

FEATURES: Mapping[str, float] = {
    "max_batch_size": 6.0,
    "max_num_tokens": 6.0,
    "tokens_per_block": 4.0,
    "tensor_parallel_size": 3.0,
    "pipeline_parallel_size": 3.0,
}
"""Knobs that count by their logarithm to base 2, and how many doublings are far apart."""

NEAR = 0.1
"""Distance below which two candidates are the same in effect."""

KINDS = (
    "quantization", "kv_cache_dtype", "enable_chunked_prefill", "capacity_scheduler_policy",
    "enable_attention_dp", "moe_expert_parallel_size",
)  # fmt: skip
"""Knobs that are the same or not."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pool:
    """Candidates, the plan's own first choice first."""

    predictions: tuple[Prediction, ...]
    log_scores: FloatArray
    log_sd: FloatArray
    distances: FloatArray
    """Between any two among the knobs, shape (n, n)."""
    default: int
    """Index of the engine's default."""

    @property
    def configs(self) -> tuple[EngineConfig, ...]:
        """What each candidate deploys."""
        return tuple(prediction.config for prediction in self.predictions)

    @property
    def key(self) -> str:
        """The same for the same candidates: hosts that share a study must agree on it."""
        text = json.dumps([asdict(config) for config in self.configs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def belief(self) -> Belief:
        """Return what the predictions alone say."""
        return Belief.prior(self.log_scores, self.log_sd, self.distances)

    def free_bytes(self) -> FloatArray:
        """Return what each candidate is predicted to leave free on a GPU."""
        return np.array([float(p.memory.free_bytes_per_gpu) for p in self.predictions])


def make_pool(problem: Problem, request: PlanRequest, demand: Demand, *, objective: str) -> Pool:
    """Return the most promising configurations that differ, and the engine's default.

    Args:
        problem: What is asked.
        request: What may be chosen, and how long the search may take.
        demand: What every candidate is simulated under.
        objective: `goodput`, `throughput`, `latency` or `cost`.
    """
    options = SearchOptions(
        objective=objective,
        trials=request.trials,
        time_budget_s=SEARCH_S,
        seed=request.seed,
    )
    space = search_space(problem, request)
    found = search(space, problem.evaluator, options)
    ranked = [c.config for c in found.candidates if c.feasible] or [found.best.config]
    chosen = _different([*_different(ranked, NUM_BEST), *_varied(space, ranked[0])], POOL_SIZE)
    default = _default_of(problem, chosen[0])
    configs = list(dict.fromkeys([*chosen, default]))
    num_servers = found.best.deployment.num_servers
    predictions = tuple(
        predict_deployment(
            problem.evaluator, problem.deployment_of(config, num_servers=num_servers), demand
        )
        for config in configs
    )
    pairs = [_log_score_and_error(p, objective, problem.slo) for p in predictions]
    return Pool(
        predictions=predictions,
        log_scores=np.array([pair[0] for pair in pairs]),
        log_sd=np.array([pair[1] for pair in pairs]),
        distances=np.array([[_distance(a, b) for b in configs] for a in configs]),
        default=configs.index(default),
    )


def measured_log_score(
    measured: Mapping[str, float],
    requests: Sequence[Mapping[str, Any]],
    *,
    objective: str,
    slo: Mapping[str, float],
    num_gpus: int,
) -> float:
    """Return the log score of a run, as `Pool.log_scores` has it of a prediction.

    Args:
        measured: Metrics by name, latencies in milliseconds.
        requests: Lines of its requests file.
        objective: What is maximised.
        slo: Limits in the units of the metric's name.
        num_gpus: Of the deployment.
    """
    values = dict(measured)
    if objective == "goodput":
        values["goodput_request_per_s"] = measured_goodput_per_s(requests, slo)
    score = _score(values, objective, num_gpus)
    return _penalised(score, values, slo)


def measured_goodput_per_s(
    requests: Sequence[Mapping[str, Any]], slo: Mapping[str, float]
) -> float:
    """Return the requests/s of a run that met every limit, from the lines of its requests file."""
    return goodput_per_s(_times(requests), request_limits(slo))


def _log_score_and_error(
    prediction: Prediction, objective: str, slo: Mapping[str, float]
) -> tuple[float, float]:
    values = {name: metric.value for name, metric in prediction.metrics.items()}
    score = _score(values, objective, prediction.deployment.num_gpus)
    low, high = prediction.metrics[DECIDING[objective].measured].interval_90
    width = math.log(high / low) if 0 < low < high else 0.5
    return _penalised(score, values, slo), width / (2 * NORMAL_Q95)


def _score(values: Mapping[str, float], objective: str, num_gpus: int) -> float:
    deciding = DECIDING[objective]
    value = values[deciding.measured]
    if objective == "latency":
        return 1.0 / max(value, SMALLEST_SCORE)
    return value / num_gpus if deciding.is_per_gpu else value


def _penalised(score: float, values: Mapping[str, float], slo: Mapping[str, float]) -> float:
    misses = [values[name] / limit - 1 for name, limit in slo.items() if name in values]
    excess = max(misses, default=0.0)
    return math.log(max(score, SMALLEST_SCORE)) - EXCESS_PENALTY * min(max(excess, 0.0), 2.0)


def _times(requests: Sequence[Mapping[str, Any]]) -> RequestTimes:
    good = [r for r in requests if r.get("status", "ok") == "ok"]
    return RequestTimes(
        arrival_s=np.array([float(r["arrival_s"]) for r in good]),
        ttft_s=np.array([float(r["ttft_ms"]) / 1e3 for r in good]),
        e2el_s=np.array([float(r["e2el_ms"]) / 1e3 for r in good]),
        osl=np.array([int(r["osl"]) for r in good]),
        itl_s=np.zeros(0),
    )


def _varied(space: SearchSpace, best: EngineConfig) -> Iterator[EngineConfig]:
    """Yield the best with one knob changed: what the model holds for alike may not be."""
    for knob in VARIED_KNOBS:
        for value in space.choices(knob):
            config = replace(best, **{knob: value})
            if not space.rules.violations(config, model=space.model, gpu=space.gpu):
                yield config


def _different(configs: Sequence[EngineConfig], most: int) -> list[EngineConfig]:
    """Return the best first, at most a few of each precision and split, none twice in effect."""
    by_kind: dict[tuple[Any, ...], int] = {}
    chosen: list[EngineConfig] = []
    for config in configs:
        kind = (config.quantization, config.kv_cache_dtype, config.tensor_parallel_size,
                config.pipeline_parallel_size, config.enable_attention_dp)  # fmt: skip
        near = any(_distance(config, other) < NEAR for other in chosen)
        if not near and by_kind.get(kind, 0) < PER_KIND:
            by_kind[kind] = by_kind.get(kind, 0) + 1
            chosen.append(config)
        if len(chosen) == most:
            break
    return chosen


def _default_of(problem: Problem, best: EngineConfig) -> EngineConfig:
    """What the engine does when nobody says, on as many GPUs as the best takes."""
    defaults = defaults_of(problem.evaluator.calibration.engine)
    return replace(
        EngineConfig(),
        **dict(defaults),
        quantization=problem.model.checkpoint_quantization,
        tensor_parallel_size=best.tensor_parallel_size,
        pipeline_parallel_size=best.pipeline_parallel_size,
        max_seq_len=best.max_seq_len,
    )


def _distance(one: EngineConfig, other: EngineConfig) -> float:
    sizes = [
        math.log2(getattr(one, knob) / getattr(other, knob)) / doublings
        for knob, doublings in FEATURES.items()
    ]
    kinds = [0.5 * (getattr(one, knob) != getattr(other, knob)) for knob in KINDS]
    return math.hypot(*sizes, *kinds)
