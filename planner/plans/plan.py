"""A plan: the recommended configuration, why this one, and what else there was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cost_models.engine import EngineConfig
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import Prediction, config_to_json, predict_config
from planner.prediction.simulation import Demand
from planner.search.objective import KV_HANDICAP, QUALITY_HANDICAP
from planner.search.space import SearchSpace
from planner.search.study import Candidate, SearchOptions, SearchResult, evaluated, search

NUM_ALTERNATIVES = 5

NEIGHBOUR_KNOBS = (
    "quantization",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "max_batch_size",
    "max_num_tokens",
    "tokens_per_block",
    "free_gpu_memory_fraction",
    "enable_chunked_prefill",
    "capacity_scheduler_policy",
    "stream_interval",
)

SHOWN_CHANGES = ("highest_rate_per_s", "ttft_ms.p99", "tpot_ms.mean", "output_tok_per_s_per_gpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A candidate that was not recommended."""

    prediction: Prediction
    rejected_because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """What changing one knob would do to the recommendation."""

    knob: str
    value: Any
    changes: Mapping[str, tuple[float, float]]
    """(recommended, neighbour) by metric."""
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """What would make an infeasible plan feasible."""

    limit: str
    needed: float
    given: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer to `plan`."""

    status: str
    """`feasible`, or `infeasible`: then the recommendation is the nearest there is."""
    objective: str
    recommended: Prediction
    alternatives: tuple[Alternative, ...]
    neighbours: tuple[Neighbour, ...]
    relaxations: tuple[Relaxation, ...]
    search: SearchResult
    risk: float = 0.0
    """Limits hold at the upper end of the interval of 1 - risk; 0: at the value itself."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the question named: GPU, workload, model, engine, GPUs at hand, SLO, risk."""

    @property
    def binding_limit(self) -> str:
        """What stops the recommendation from serving more."""
        return self.recommended.binding_limit

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "status": self.status,
            "objective": self.objective,
            "asked": dict(self.asked),
            "recommended": self.recommended.to_json(),
            "alternatives": [
                alternative.prediction.to_json()
                | {"rejected_because": alternative.rejected_because}
                for alternative in self.alternatives
            ],
            "pareto": [
                {
                    "config": config_to_json(point.config),
                    "output_tok_per_s_per_gpu": round(point.tok_per_s_per_gpu, 2),
                    "output_tok_per_s_per_user": round(point.tok_per_s_per_user, 2),
                }
                for point in self.search.pareto
            ],
            "binding_limit": self.binding_limit,
            "neighbours": [
                {
                    "knob": neighbour.knob,
                    "value": neighbour.value,
                    "changes": {k: list(v) for k, v in neighbour.changes.items()},
                    "verdict": neighbour.verdict,
                }
                for neighbour in self.neighbours
            ],
            "relaxations": [
                {"limit": r.limit, "needed": r.needed, "given": r.given} for r in self.relaxations
            ],
            "search": {
                "num_evaluated": self.search.num_evaluated,
                "wall_s": round(self.search.wall_s, 3),
                "seed": self.search.seed,
            },
        }


def make_plan(
    space: SearchSpace, evaluator: Evaluator, options: SearchOptions, demand: Demand
) -> Plan:
    """Search a space, simulate the finalists and explain the result.

    The closed form ranks; the first finalist that keeps every limit when the demand is
    simulated is recommended. Those behind it stay predicted in closed form.
    """
    found = search(space, evaluator, options)
    finalists = _finalists(found)
    simulated = _simulated(finalists, evaluator, demand)
    best, recommended = simulated[-1]
    if not recommended.feasible:
        best, recommended = _repaired(space, evaluator, simulated, (options.objective, demand))
    known = {candidate.config: prediction for candidate, prediction in simulated}
    predictions = [known.get(c.config) or predict_config(evaluator, c.config) for c in finalists]
    return Plan(
        status="feasible" if recommended.feasible else "infeasible",
        objective=options.objective,
        recommended=recommended,
        alternatives=tuple(
            Alternative(
                prediction=prediction, rejected_because=_rejection(best, candidate, prediction)
            )
            for candidate, prediction in zip(finalists, predictions, strict=True)
            if candidate.config != best.config
        ),
        neighbours=_neighbours(space, evaluator, best.config),
        relaxations=() if recommended.feasible else _relaxations(recommended, evaluator.slo),
        search=found,
        risk=evaluator.risk,
    )


def _finalists(found: SearchResult) -> list[Candidate]:
    """The best candidate, and the best of each other way to split and store the model."""
    by_split: dict[tuple[Any, ...], Candidate] = {}
    for candidate in found.candidates:
        by_split.setdefault(_split(candidate.config), candidate)
    return list(by_split.values())[: NUM_ALTERNATIVES + 1]


Simulated = tuple[Candidate, Prediction]


def _simulated(finalists: list[Candidate], evaluator: Evaluator, demand: Demand) -> list[Simulated]:
    """Simulate finalists in order, up to the first that keeps every limit."""
    results: list[Simulated] = []
    for candidate in finalists:
        results.append((candidate, predict_config(evaluator, candidate.config, demand)))
        if results[-1][1].feasible:
            break
    return results


def _repaired(
    space: SearchSpace,
    evaluator: Evaluator,
    simulated: list[Simulated],
    task: tuple[str, Demand],
) -> Simulated:
    """Try smaller steps where the simulation breaks a limit that the closed form keeps.

    Long prefills hold up whatever decodes beside them, which averages do not show. Returns
    the first that keeps every limit, else the nearest to it.
    """
    objective, demand = task
    tried = list(simulated)
    for config in _with_smaller_steps(space, simulated[0][0].config):
        candidate = evaluated(config, evaluator, objective)
        tried.append((candidate, predict_config(evaluator, config, demand)))
        if tried[-1][1].feasible:
            return tried[-1]
    return min(tried, key=lambda result: result[1].violation)


def _with_smaller_steps(space: SearchSpace, config: EngineConfig) -> list[EngineConfig]:
    """The same with smaller token budgets and chunked prefill, largest first."""
    budgets = [b for b in space.choices("max_num_tokens") if b < config.max_num_tokens]
    chunked = True in space.choices("enable_chunked_prefill")
    smaller = [
        replace(config, max_num_tokens=budget, enable_chunked_prefill=chunked)
        for budget in sorted(budgets, reverse=True)
    ]
    model, gpu = space.model, space.gpu
    return [c for c in smaller if not space.rules.violations(c, model=model, gpu=gpu)]


def _rejection(best: Candidate, other: Candidate, prediction: Prediction) -> str:
    if not prediction.fits:
        shortfall = float(prediction.memory.shortfall_bytes) / 2**30
        return f"does not fit: {shortfall:.1f} GiB short ({prediction.memory.binding})"
    broken = [name for name, excess in prediction.slo_excess.items() if excess > 0]
    if broken:
        worst = max(broken, key=lambda name: prediction.slo_excess[name])
        return f"misses the SLO: {worst} is {100 * prediction.slo_excess[worst]:.0f} % over"
    if prediction.refused_share > 0:
        return "refuses prompts longer than max_num_tokens"
    gap = 100 * (other.raw_score / best.raw_score - 1) if best.raw_score else 0.0
    gap = gap if best.raw_score >= 0 else -gap
    if gap > 0.05:
        handicap = (
            QUALITY_HANDICAP[other.config.quantization] + KV_HANDICAP[other.config.kv_cache_dtype]
        )
        return (
            f"{gap:+.1f} % on the objective, less than the {100 * handicap:.0f} % that "
            f"{other.config.quantization}/{other.config.kv_cache_dtype} must gain for its risk to "
            "quality"
        )
    return f"{gap:+.1f} % on the objective"


def _neighbours(
    space: SearchSpace, evaluator: Evaluator, config: EngineConfig
) -> tuple[Neighbour, ...]:
    """Predict what each change of one knob would do; both sides in closed form."""
    base = predict_config(evaluator, config)
    neighbours = []
    for knob in NEIGHBOUR_KNOBS:
        current = getattr(config, knob)
        for value in _beside(list(space.choices(knob)), current):
            changed = replace(config, **{knob: value})
            if knob == "max_batch_size":
                changed = replace(changed, cuda_graph_max_batch_size=value)
            if changed.num_gpus > space.num_gpus or space.rules.violations(
                changed, model=space.model, gpu=space.gpu
            ):
                continue
            neighbours.append(_neighbour(knob, value, base, predict_config(evaluator, changed)))
    return tuple(neighbours)


def _beside(values: list[Any], current: Any) -> list[Any]:
    """The next smaller and larger value of a number; every other value of anything else."""
    if isinstance(current, bool) or not isinstance(current, int | float):
        return [value for value in values if value != current]
    below = [value for value in values if value < current]
    above = [value for value in values if value > current]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _neighbour(knob: str, value: Any, base: Prediction, changed: Prediction) -> Neighbour:
    changes = {}
    for name in SHOWN_CHANGES:
        if name == "highest_rate_per_s":
            changes[name] = (base.highest_rate_per_s, changed.highest_rate_per_s)
        else:
            changes[name] = (base.value(name), changed.value(name))
    return Neighbour(knob=knob, value=value, changes=changes, verdict=_verdict(base, changed))


def _verdict(base: Prediction, changed: Prediction) -> str:
    if not changed.fits:
        return f"does not fit: {float(changed.memory.shortfall_bytes) / 2**30:.1f} GiB short"
    broken = [name for name, excess in changed.slo_excess.items() if excess > 0]
    if broken:
        return f"misses {', '.join(broken)}"
    if changed.refused_share > 0:
        return "refuses long prompts"
    if base.highest_rate_per_s <= 0:
        return "meets the SLO"
    gain = changed.highest_rate_per_s / base.highest_rate_per_s - 1
    return "no difference" if abs(gain) < 0.005 else f"{100 * gain:+.1f} % highest rate"


def _relaxations(nearest: Prediction, slo: Mapping[str, float]) -> tuple[Relaxation, ...]:
    """Each limit that the nearest plan breaks, and where it would have to be."""
    broken = [
        Relaxation(limit=name, needed=slo[name] * (1 + excess), given=slo[name])
        for name, excess in nearest.slo_excess.items()
        if excess > 0
    ]
    if not nearest.fits:
        total = float(nearest.memory.total_bytes)
        needed = total + float(nearest.memory.shortfall_bytes)
        broken.append(Relaxation(limit="memory_bytes per GPU", needed=needed, given=total))
    return tuple(broken)


def _split(config: EngineConfig) -> tuple[Any, ...]:
    return (
        config.quantization,
        config.kv_cache_dtype,
        config.tensor_parallel_size,
        config.pipeline_parallel_size,
        config.moe_expert_parallel_size,
        config.enable_attention_dp,
        config.num_replicas,
    )
