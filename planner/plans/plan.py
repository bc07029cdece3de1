"""A plan: the recommended configuration, why this one, and what else there was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cost_models.deployment import Deployment
from planner.percent import probability_words
from planner.plans.decide import (
    Finalist,
    best_of_each_split,
    decide,
    neighbouring,
    split_of,
    with_host_uncertainty,
)
from planner.plans.growth import GrowthStep, growth_of
from planner.plans.scheduling import Scheduling, scheduling_of
from planner.prediction.evaluator import Evaluator
from planner.prediction.intervals import probability_within
from planner.prediction.predict import (
    HostUncertainty,
    Prediction,
    config_to_json,
    predict_deployment,
)
from planner.quality import QUALITY_LOSS
from planner.search.objective import quality_handicap
from planner.search.polish import settled
from planner.search.space import SearchSpace
from planner.search.study import Candidate, SearchOptions, SearchResult, search
from planner.workloads.demand import Demand

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
    "enable_piecewise_cuda_graph",
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
    scheduling: Scheduling
    """What other orders of the waiting queue would do."""
    num_gpus: int = 1
    """GPUs at hand; the recommendation may take fewer."""
    growth: tuple[GrowthStep, ...] = ()
    """What further GPUs would buy."""
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
                    "config": config_to_json(point.deployment),
                    "output_tok_per_s_per_gpu": round(point.tok_per_s_per_gpu, 2),
                    "output_tok_per_s_per_user": round(point.tok_per_s_per_user, 2),
                    "quality_loss_pct": round(point.quality.loss_pct, 3),
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
            "growth": [step.to_json() for step in self.growth],
            "scheduling": self.scheduling.to_json(),
            "search": {
                "num_evaluated": self.search.num_evaluated,
                "wall_s": round(self.search.wall_s, 3),
                "seed": self.search.seed,
            },
        }


def make_plan(
    space: SearchSpace,
    evaluator: Evaluator,
    options: SearchOptions,
    demand: Demand,
    *,
    all_orders: bool = False,
) -> Plan:
    """Search a space, let the simulation decide between the finalists, and explain the result.

    Args:
        space: What may be chosen.
        evaluator: Model, GPU, calibration, load and SLO.
        options: How to search, and for what.
        demand: Requests to simulate.
        all_orders: Simulate other orders of the queue however long that takes.
    """
    stopped = _deadline(options)
    found = search(space, evaluator, options)
    finalists = best_of_each_split(found)
    first = settled(finalists[0], space, evaluator, objective=options.objective)
    finalists = list(dict.fromkeys([first, *finalists]))
    decision = decide(
        space,
        evaluator,
        finalists,
        objective=options.objective,
        demand=demand,
        stopped=stopped,
    )
    winner, simulated = decision.winner, (decision.winner, *decision.others)
    recommended = _of_the_whole_fleet(winner, evaluator, demand)
    recommended = replace(recommended, highest_rate_per_s=decision.rate_per_s)
    closed_form = _ClosedForm(evaluator, recommended)
    known = {finalist.deployment: finalist for finalist in simulated}
    others = [c for c in finalists if split_of(c.config) != split_of(winner.config)]
    others = [*_less_likely(simulated, others), *others][:NUM_ALTERNATIVES]

    def rejected(candidate: Candidate) -> Alternative:
        other = known.get(candidate.deployment)
        if other is not None:
            # What was near enough to decide has it simulated; the rest shows it at no cost.
            other = with_host_uncertainty(other, evaluator, demand, HostUncertainty.CLOSED_FORM)
            return _simulated_alternative(other, winner)
        gain = _gain(candidate.raw_score, winner.candidate.raw_score)
        return _alternative(candidate, closed_form.predict(candidate.deployment), gain)

    return Plan(
        status="feasible" if recommended.feasible else "infeasible",
        objective=options.objective,
        recommended=recommended,
        alternatives=tuple(rejected(candidate) for candidate in others),
        neighbours=_neighbours(space, closed_form),
        relaxations=() if recommended.feasible else _relaxations(recommended, evaluator.limits),
        search=found,
        scheduling=scheduling_of(
            recommended,
            evaluator=evaluator,
            demand=demand,
            rules=space.rules,
            always=all_orders,
        ),
        num_gpus=space.num_gpus,
        growth=growth_of(
            winner.deployment,
            [candidate.config for candidate in finalists],
            space=space,
            evaluator=evaluator,
            objective=options.objective,
            rate_factor=closed_form.rate_factor,
        ),
        risk=evaluator.risk,
    )


def _of_the_whole_fleet(winner: Finalist, evaluator: Evaluator, demand: Demand) -> Prediction:
    """Return the winner's prediction with every server simulated, where one stood for all."""
    simulation = winner.prediction.simulation
    if simulation is None or simulation.stands_for == 1:
        return winner.prediction
    return predict_deployment(evaluator, winner.deployment, demand)


def _deadline(options: SearchOptions) -> Callable[[], bool]:
    """Return what says that the time is up, or that somebody has called the plan off."""
    ends_s = time.monotonic() + options.time_budget_s
    called_off = options.stopped or (lambda: False)
    return lambda: time.monotonic() > ends_s or called_off()


class _ClosedForm:
    """Predicts what was not simulated, corrected by what the simulation made of the winner."""

    def __init__(self, evaluator: Evaluator, recommended: Prediction) -> None:
        self.evaluator = evaluator
        base = predict_deployment(evaluator, recommended.deployment)
        estimated, simulated = base.highest_rate_per_s, recommended.highest_rate_per_s
        self.rate_factor = simulated / estimated if estimated and simulated else 1.0
        self.base = replace(base, highest_rate_per_s=estimated * self.rate_factor)
        self.factor = {
            name: (1 + excess) / (1 + self.base.slo_excess[name])
            for name, excess in recommended.slo_excess.items()
            if 1 + self.base.slo_excess[name] > 0
        }

    def predict(self, deployment: Deployment) -> Prediction:
        """Return a prediction whose limits are broken as far beside the winner's as they are."""
        prediction = predict_deployment(self.evaluator, deployment)
        return replace(
            prediction,
            highest_rate_per_s=prediction.highest_rate_per_s * self.rate_factor,
            slo_excess={
                name: (1 + excess) * self.factor.get(name, 1.0) - 1
                for name, excess in prediction.slo_excess.items()
            },
            slo_probability={
                name: self._probability(prediction, name, limit)
                for name, limit in self.evaluator.slo.items()
            },
        )

    def _probability(self, prediction: Prediction, name: str, limit: float) -> float:
        metric = prediction.metrics[name]
        # A metric so much above the closed form keeps a limit as often as it one so much below.
        return probability_within(
            limit / self.factor.get(name, 1.0), metric.value, metric.interval_90
        )


def _less_likely(simulated: Sequence[Finalist], others: Sequence[Candidate]) -> list[Candidate]:
    """Return what promised most of all, where the doubt of its SLO has decided against it."""
    winner, known = simulated[0], {candidate.deployment for candidate in others}
    promising = [
        one
        for one in simulated[1:]
        if one.prediction.feasible and one.score > winner.score and one.deployment not in known
    ]
    return [one.candidate for one in sorted(promising, key=lambda one: -one.score)[:1]]


def _simulated_alternative(other: Finalist, winner: Finalist) -> Alternative:
    gain = _gain(other.value, winner.value)
    odds = (other.prediction.probability, winner.prediction.probability)
    if other.prediction.feasible and other.score > winner.score and odds[0] < odds[1]:
        reason = (
            f"{100 * gain:+.1f} % on the objective, but holds its SLO with a probability of "
            f"{probability_words(odds[0])} instead of {probability_words(odds[1])}"
        )
        return Alternative(prediction=other.prediction, rejected_because=reason)
    return _alternative(other.candidate, other.prediction, gain)


def _alternative(other: Candidate, prediction: Prediction, gain: float) -> Alternative:
    return Alternative(prediction=prediction, rejected_because=_rejection(gain, other, prediction))


def _gain(value: float, best: float) -> float:
    """Return by how much a value is above the best, as a share."""
    return (value - best) / abs(best) if best else 0.0


def _rejection(gain: float, other: Candidate, prediction: Prediction) -> str:
    """Say why a candidate is not recommended; `gain` is that on the objective, as a share."""
    if not prediction.fits:
        shortfall = float(prediction.memory.shortfall_bytes) / 2**30
        return f"does not fit: {shortfall:.1f} GiB short ({prediction.memory.binding})"
    broken = [name for name, excess in prediction.slo_excess.items() if excess > 0]
    if broken:
        worst = max(broken, key=lambda name: prediction.slo_excess[name])
        if worst == QUALITY_LOSS:
            return _too_lossy(prediction)
        return f"misses the SLO: {worst} is {100 * prediction.slo_excess[worst]:.0f} % over"
    if prediction.refused_share > 0:
        return "refuses prompts longer than max_num_tokens"
    if gain > 0.0005:
        return (
            f"{100 * gain:+.1f} % on the objective, less than the "
            f"{100 * quality_handicap(other.quality):.1f} % that {other.config.quantization}/"
            f"{other.config.kv_cache_dtype} must gain for its risk to quality"
        )
    return f"{100 * gain:+.1f} % on the objective"


def _neighbours(space: SearchSpace, closed_form: _ClosedForm) -> tuple[Neighbour, ...]:
    """Predict what each change of one knob would do; both sides in closed form."""
    base = closed_form.base
    neighbours = []
    for knob in NEIGHBOUR_KNOBS:
        for value in neighbouring(space.choices(knob), base.deployment.knob(knob)):
            changed = space.legal(base.deployment, **{knob: value})
            if changed is not None:
                prediction = closed_form.predict(changed)
                neighbours.append(_neighbour(knob, value, base, prediction))
    return (*neighbours, *_drafting_neighbours(space, closed_form))


def _drafting_neighbours(space: SearchSpace, closed_form: _ClosedForm) -> Iterator[Neighbour]:
    """Predict what each other way to draft would do, at its best length, and drafting nothing."""
    base = closed_form.base
    by_kind: dict[str, list[Prediction]] = {}
    for config in space.speculating(base.config):
        if config.decoding_type != base.config.decoding_type:
            drafting = closed_form.predict(base.deployment.with_config(config))
            by_kind.setdefault(config.decoding_type, []).append(drafting)
    if base.config.speculates:
        plain = base.deployment.with_knobs(decoding_type="", max_draft_len=0, speculative_model="")
        by_kind["off"] = [closed_form.predict(plain)]
    for kind, predictions in by_kind.items():
        best = min(predictions, key=lambda one: (not one.feasible, one.value("tpot_ms.mean")))
        neighbour = _neighbour("decoding_type", kind, base, best)
        yield replace(neighbour, verdict=f"{_drafting_words(base, best)}{neighbour.verdict}")


def _drafting_words(base: Prediction, other: Prediction) -> str:
    """Say what drafts are assumed to be worth at this load."""
    if not other.fits:
        return ""
    change = other.value("tpot_ms.mean") / base.value("tpot_ms.mean") - 1
    speculation = other.speculation
    if speculation is None:
        return f"{100 * change:+.1f} % TPOT, "
    told = "assumed" if speculation.acceptance.is_prior else "known"
    return (
        f"{100 * change:+.1f} % TPOT at max_draft_len={speculation.max_draft_len} "
        f"({speculation.tokens_per_step:.2f} tokens a step {told}), "
    )


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
    if broken == [QUALITY_LOSS]:
        return _too_lossy(changed)
    if broken:
        return f"misses {', '.join(broken)}"
    if changed.refused_share > 0:
        return "refuses long prompts"
    what, one, other = "highest rate", base.highest_rate_per_s, changed.highest_rate_per_s
    if one <= 0:
        name = "output_tok_per_s_per_gpu"
        what, one, other = "tokens/s/GPU", base.value(name), changed.value(name)
    gain = other / one - 1
    verdict = "no difference" if abs(gain) < 0.005 else f"{100 * gain:+.1f} % {what}"
    before, after = base.deployment.num_gpus, changed.deployment.num_gpus
    if before == after or what != "highest rate":
        return verdict
    per_gpu = (1 + gain) * before / after - 1
    return f"{verdict} on {_gpus(after)} instead of {before}, {100 * per_gpu:+.1f} % a GPU"


def _gpus(count: int) -> str:
    return f"{count} GPUs" if count > 1 else "1 GPU"


def _too_lossy(prediction: Prediction) -> str:
    return f"loses too much quality: {prediction.quality.loss_pct:.1f} % expected"


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
