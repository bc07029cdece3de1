"""The decision: the simulation chooses among what the closed form proposes.

Averages rank well where nothing is near its limit. Near a limit, or in a closed loop, queues and
steps that hold prompts decide, which only the simulation shows: there the knobs of the step are
climbed under it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cost_models.engine import EngineConfig
from planner.estimator.load import Protocol
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import Prediction, predict_config
from planner.prediction.simulation import Demand
from planner.search.objective import handicapped
from planner.search.space import SearchSpace
from planner.search.study import Candidate, SearchResult, evaluated

MOST_FINALISTS = 6

FEWEST_SIMULATED, MOST_SIMULATED, MOST_WORK = 6, 24, 500_000
"""Simulations of one decision, and their work: counts, so that all hosts decide alike."""

STEPS_PER_REQUEST = 10
"""A simulated request takes about as long as so many steps."""

WORTH_SIMULATING = 0.8
"""Share of the best closed-form score below which another split does not catch up."""

NEAR_LIMIT = 0.3
"""Share of an SLO's limit within which averages are not trusted."""

LEAST_GAIN = 0.002
"""Of the simulated objective; less is chance."""

CLIMBED_KNOBS = (
    "max_num_tokens",
    "max_batch_size",
    "kv_cache_dtype",
    "tokens_per_block",
    "enable_chunked_prefill",
)

OBJECTIVE_METRICS: Mapping[str, tuple[str, float]] = {
    "goodput": ("goodput_request_per_s", 1.0),
    "throughput": ("output_tok_per_s_per_gpu", 1.0),
    "latency": ("e2el_ms.mean", -1.0),
    "cost": ("usd_per_million_output_tokens", -1.0),
}
"""Simulated metric of each objective, and its sign: larger is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A candidate with its simulated prediction."""

    candidate: Candidate
    prediction: Prediction
    objective: str

    @property
    def config(self) -> EngineConfig:
        """What is deployed."""
        return self.candidate.config

    @property
    def value(self) -> float:
        """The simulated objective; larger is better."""
        metric, sign = OBJECTIVE_METRICS[self.objective]
        return sign * self.prediction.value(metric)

    @property
    def score(self) -> float:
        """The simulated objective less what the precision must gain; larger is better."""
        return handicapped(self.value, self.candidate.quality)

    def beats(self, other: Finalist) -> bool:
        """Whether it is better by more than chance; of equals the closed form decides."""
        if self.prediction.feasible != other.prediction.feasible:
            return self.prediction.feasible
        if not self.prediction.feasible:
            return self.prediction.violation < other.prediction.violation - LEAST_GAIN
        gain = self.score - other.score
        least = LEAST_GAIN * abs(other.score)
        return gain > least or (gain >= -least and self.candidate.score > other.candidate.score)


def best_of_each_split(found: SearchResult) -> list[Candidate]:
    """Return the best candidate, and the best of each other way to split and store the model."""
    by_split: dict[tuple[Any, ...], Candidate] = {}
    for candidate in found.candidates:
        by_split.setdefault(_split(candidate.config), candidate)
    return list(by_split.values())[:MOST_FINALISTS]


def decide(
    space: SearchSpace,
    evaluator: Evaluator,
    finalists: list[Candidate],
    *,
    objective: str,
    demand: Demand,
    stopped: Callable[[], bool] | None = None,
) -> list[Finalist]:
    """Return all that were simulated, the winner first.

    Args:
        space: What may be chosen.
        evaluator: Model, GPU, calibration, load and SLO.
        finalists: Best first, by the closed form.
        objective: What is maximised.
        demand: Requests to simulate.
        stopped: Asked before each further simulation; once true, the best so far wins.
    """
    return _Decision(space, evaluator, objective, demand, stopped).run(finalists)


class _Decision:
    def __init__(
        self,
        space: SearchSpace,
        evaluator: Evaluator,
        objective: str,
        demand: Demand,
        stopped: Callable[[], bool] | None,
    ) -> None:
        self.space, self.evaluator = space, evaluator
        self.objective, self.demand = objective, demand
        self.stopped = stopped or (lambda: False)
        self.simulated: dict[EngineConfig, Finalist] = {}

    def run(self, finalists: list[Candidate]) -> list[Finalist]:
        best = self._simulate(finalists[0])
        if self._is_contested(best.prediction):
            for candidate in finalists[1:]:
                if best.prediction.feasible and not _is_close(candidate, finalists[0]):
                    continue
                if self._has_had_enough():
                    break
                best = self._better(best, self._simulate(candidate))
            best = self._climb(best)
        return [best, *(one for one in self.simulated.values() if one is not best)]

    def _is_contested(self, prediction: Prediction) -> bool:
        """Whether queues may decide: a closed loop, or an open one near a limit."""
        if self.demand.protocol is not Protocol.OPEN_LOOP or not prediction.feasible:
            return True
        return any(excess > -NEAR_LIMIT for excess in prediction.slo_excess.values())

    def _climb(self, best: Finalist) -> Finalist:
        """Move along one knob at a time as long as that helps."""
        moved = True
        while moved:
            moved = False
            for knob in CLIMBED_KNOBS:
                for config in self._beside(best.config, knob):
                    if self._has_had_enough():
                        return best
                    other = self._better(best, self._simulate(self._candidate(config)))
                    moved = moved or other is not best
                    best = other
        return best

    def _has_had_enough(self) -> bool:
        """Whether another simulation would take longer than a person waits, or was called off."""
        runs = [one.prediction.simulation for one in self.simulated.values()]
        work = sum(
            run.num_steps + STEPS_PER_REQUEST * run.num_requests for run in runs if run is not None
        )
        is_much = work >= MOST_WORK and len(runs) >= FEWEST_SIMULATED
        return is_much or len(runs) >= MOST_SIMULATED or self.stopped()

    def _beside(self, config: EngineConfig, knob: str) -> Iterator[EngineConfig]:
        """Yield the configurations that differ by one step of a knob and were not simulated."""
        for value in neighbouring(self.space.choices(knob), getattr(config, knob)):
            changed = with_knob(self.space, config, knob, value)
            if changed is not None and changed not in self.simulated:
                yield changed

    def _candidate(self, config: EngineConfig) -> Candidate:
        return evaluated(config, self.evaluator, self.objective)

    def _simulate(self, candidate: Candidate) -> Finalist:
        prediction = predict_config(self.evaluator, candidate.config, self.demand)
        one = Finalist(candidate=candidate, prediction=prediction, objective=self.objective)
        self.simulated[candidate.config] = one
        return one

    @staticmethod
    def _better(best: Finalist, other: Finalist) -> Finalist:
        return other if other.beats(best) else best


def with_knob(
    space: SearchSpace, config: EngineConfig, knob: str, value: Any
) -> EngineConfig | None:
    """Return a configuration with one knob changed, or None where that is not legal."""
    changed = space.with_knobs(config, **{knob: value})
    if changed.max_batch_size > changed.max_num_tokens or changed.num_gpus > space.num_gpus:
        return None
    if space.rules.violations(changed, model=space.model, gpu=space.gpu):
        return None
    return changed


def neighbouring(values: Sequence[Any], current: Any) -> list[Any]:
    """Return the next smaller and larger of numbers; of anything else every other value."""
    if isinstance(current, bool) or not isinstance(current, int | float):
        return [value for value in values if value != current]
    below = [value for value in values if value < current]
    above = [value for value in values if value > current]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _is_close(other: Candidate, best: Candidate) -> bool:
    return other.score >= best.score - (1 - WORTH_SIMULATING) * abs(best.score)


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
