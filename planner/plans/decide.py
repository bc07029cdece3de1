"""The decision: the simulation chooses among what the closed form proposes.

Averages rank well where nothing is near its limit. Near a limit, or in a closed loop, queues and
steps that hold prompts decide, which only the simulation shows: there the knobs of the step are
climbed under it.

A prediction errs, and near a limit it is chance on which side of it a run will fall. So the
simulated configurations are compared by what is expected of them: the objective times the
probability that the SLO holds (von Neumann and Morgenstern's expected value, of a run that is worth
nothing outside its SLO), among those that the prediction, at the risk that is taken, sees within
every limit (a chance constraint: Charnes and Cooper, Management Science 6, 1959).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cost_models.engine import EngineConfig
from planner.estimator.load import Protocol
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import HostDoubt, Prediction, predict_config
from planner.prediction.simulation import Demand
from planner.search.objective import DECIDING, expected, handicapped
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

STRIDES = (1, 2, 3)
"""Choices of a knob that a move goes: wider ones leave a slope that chance has bent."""

CLIMBED_KNOBS = (
    "max_num_tokens",
    "max_batch_size",
    "kv_cache_dtype",
    "tokens_per_block",
    "enable_chunked_prefill",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A candidate with its simulated prediction."""

    candidate: Candidate
    prediction: Prediction
    objective: str
    doubt: float = 0.0
    """Share of the objective that it must gain while nobody knows how many drafts are right."""
    host: HostDoubt = HostDoubt.SIMULATED
    """How the prediction holds the doubt of a borrowed host."""

    @property
    def config(self) -> EngineConfig:
        """What is deployed."""
        return self.candidate.config

    @property
    def value(self) -> float:
        """The simulated objective; larger is better."""
        deciding = DECIDING[self.objective]
        return deciding.sign * self.prediction.value(deciding.metric)

    @property
    def score(self) -> float:
        """The simulated objective less what precision and drafts must gain; larger is better."""
        return handicapped(self.value, self.candidate.quality) - self.doubt * abs(self.value)

    @property
    def expected(self) -> float:
        """The score as it counts where the SLO may not hold; larger is better."""
        return expected(self.score, self.prediction.probability)

    def beats(self, other: Finalist) -> bool:
        """Whether more is expected of it than chance; of equals the closed form decides.

        Where both miss a limit, whether it misses by less.
        """
        if self.prediction.feasible != other.prediction.feasible:
            return self.prediction.feasible
        if not self.prediction.feasible:
            return self.prediction.violation < other.prediction.violation - LEAST_GAIN
        gain = self.expected - other.expected
        least = LEAST_GAIN * abs(other.expected)
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
        best = self._sure(best) if self.evaluator.slo else best
        if self._is_contested(best.prediction):
            for candidate in finalists[1:]:
                if best.prediction.feasible and not _may_catch_up(candidate, finalists[0], best):
                    continue
                if self._has_had_enough():
                    break
                best = self._better(best, self._simulate(candidate))
            best = self._climb(best)
        best = self._sure(self._speculate(best))
        return [best, *(one for one in self.simulated.values() if one is not best)]

    def _is_contested(self, prediction: Prediction) -> bool:
        """Whether queues may decide: a closed loop, or an open one near a limit or in doubt."""
        if self.demand.protocol is not Protocol.OPEN_LOOP or not prediction.feasible:
            return True
        if prediction.probability < 1 - LEAST_GAIN:
            return True
        return any(excess > -NEAR_LIMIT for excess in prediction.slo_excess.values())

    def _climb(self, best: Finalist) -> Finalist:
        """Move along one knob at a time as long as that helps; by wider strides where none does."""
        place = 0
        while place < len(STRIDES):
            before = best
            for knob in CLIMBED_KNOBS:
                for config in self._beside(best.config, knob, STRIDES[place]):
                    if self._has_had_enough():
                        return best
                    best = self._better(best, self._simulate(self._candidate(config)))
            place = place + 1 if best is before else 0
        return best

    def _speculate(self, best: Finalist) -> Finalist:
        """Draft on top of the winner where the closed form sees a gain beyond its doubt."""
        plain = self._candidate(best.config)
        tried = [self._candidate(config) for config in self.space.speculating(best.config)]
        gains = [one for one in tried if self._certain_score(one) > plain.score]
        promising = [one for one in gains if one.feasible or not plain.feasible]
        if not promising or self.stopped():
            return best
        return self._better(best, self._simulate(max(promising, key=self._certain_score)))

    def _certain_score(self, candidate: Candidate) -> float:
        return candidate.score - abs(candidate.raw_score) * self._doubt(candidate.config)

    def _doubt(self, config: EngineConfig) -> float:
        return 1 - math.exp(-self.evaluator.acceptance_log_error(config))

    def _has_had_enough(self) -> bool:
        """Whether another simulation would take longer than a person waits, or was called off."""
        known = self.simulated.values()
        is_much = sum(map(self._work, known)) >= MOST_WORK and len(known) >= FEWEST_SIMULATED
        return is_much or len(known) >= MOST_SIMULATED or self.stopped()

    def _work(self, one: Finalist) -> int:
        """Steps that were simulated, and requests in steps: of hosts in doubt, thrice."""
        run = one.prediction.simulation
        if run is None:
            return 0
        hosts = self.evaluator.hosts() if one.host is HostDoubt.SIMULATED else ()
        return (1 + len(hosts)) * (run.num_steps + STEPS_PER_REQUEST * run.num_requests)

    def _beside(self, config: EngineConfig, knob: str, stride: int) -> Iterator[EngineConfig]:
        """Yield the configurations that differ by one stride of a knob and were not simulated."""
        choices, current = self.space.choices(knob), getattr(config, knob)
        if knob == "max_batch_size" and self.demand.concurrency:
            # Batches beyond the clients are all alike: the next smaller one that matters.
            wide = [value for value in choices if value >= self.demand.concurrency]
            current = min([current, *wide])
        for value in neighbouring(choices, current, stride=stride):
            changed = with_knob(self.space, config, knob, value)
            if changed is not None and changed not in self.simulated:
                yield changed

    def _candidate(self, config: EngineConfig) -> Candidate:
        return evaluated(config, self.evaluator, self.objective)

    def _simulate(self, candidate: Candidate) -> Finalist:
        """Predict a candidate; the doubt of its host only where it decides what is feasible."""
        host = HostDoubt.SIMULATED if self.evaluator.risk else HostDoubt.LEFT_OUT
        one = Finalist(
            candidate=candidate,
            prediction=predict_config(self.evaluator, candidate.config, self.demand, host=host),
            objective=self.objective,
            doubt=self._doubt(candidate.config),
            host=host,
        )
        self.simulated[candidate.config] = one
        return one

    def _better(self, best: Finalist, other: Finalist) -> Finalist:
        """Return the better of two.

        The doubt of the host, which takes two more simulations, makes it only less likely that a
        limit holds within which the prediction is: what is not better without it is not with it.
        """
        if not other.beats(best):
            return best
        other = self._sure(other) if self.evaluator.slo else other
        return other if other.beats(best) else best

    def _sure(self, one: Finalist) -> Finalist:
        """Return the same with the doubt of the host simulated."""
        sure = with_host_doubt(one, self.evaluator, self.demand, HostDoubt.SIMULATED)
        self.simulated[one.config] = sure
        return sure


def with_host_doubt(
    one: Finalist, evaluator: Evaluator, demand: Demand, how: HostDoubt
) -> Finalist:
    """Return the same with the doubt of a borrowed host, where it was left out so far."""
    if one.host is not HostDoubt.LEFT_OUT or not evaluator.hosts():
        return one
    simulation = one.prediction.simulation
    prediction = predict_config(evaluator, one.config, demand, host=how, simulation=simulation)
    return replace(one, prediction=prediction, host=how)


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


def neighbouring(values: Sequence[Any], current: Any, *, stride: int = 1) -> list[Any]:
    """Return the next smaller and larger of numbers, or the next but some.

    Of anything else every other value.
    """
    if isinstance(current, bool) or not isinstance(current, int | float):
        return [value for value in values if value != current]
    below = sorted((value for value in values if value < current), reverse=True)
    above = sorted(value for value in values if value > current)
    return [*below[stride - 1 : stride], *above[stride - 1 : stride]]


def _may_catch_up(other: Candidate, first: Candidate, best: Finalist) -> bool:
    """Whether simulating another split may find more than what is expected of the best so far.

    It may keep its SLO for certain, which the best does not.
    """
    hoped = expected(first.score, best.prediction.probability)
    return other.score >= hoped - (1 - WORTH_SIMULATING) * abs(hoped)


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
