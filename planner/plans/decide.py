"""The decision: the simulation chooses among what the closed form proposes.

Averages rank well where nothing is near its limit. Near a limit, in a closed loop or between
several servers, queues and steps that hold prompts decide, which only the simulation shows: there
the knobs of the step are climbed under it.

Of what is feasible the fewest GPUs come first, and the objective after that, unless all GPUs are
to be used. A prediction errs, and near a limit it is chance on which side of it a run will fall.
So the simulated deployments are compared by what is expected of them: the objective times the
probability that the SLO holds (von Neumann and Morgenstern's expected value, of a run that is
worth nothing outside its SLO), and GPUs divided by it, among those that the prediction, at the risk
that is taken, sees within every limit (a chance constraint: Charnes and Cooper, Management
Science 6, 1959).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from planner.prediction.evaluator import Evaluator
from planner.prediction.highest_rate import highest_rate
from planner.prediction.predict import HostUncertainty, Prediction, predict_deployment
from planner.search.objective import DECIDING, expected, handicapped, weighted_gpus
from planner.search.polish import simplified
from planner.search.space import OUTER_KNOBS, SearchSpace
from planner.search.study import Candidate, SearchResult, evaluated
from planner.workloads.demand import Demand
from planner.workloads.load import ArrivalMode

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

MOST_COUNTS = 3
"""Times that servers are counted anew because another number takes another rate each."""

RATED = ("goodput", "throughput")
"""Objectives that grow with the highest rate under the SLO."""

RUN_OFF = 0.05
"""Share of the best closed-form score within which the simulated highest rates decide."""

MOST_RIVALS = 2
"""Near equals whose highest rate is simulated."""

RATE_ERROR = 0.01
"""Relative error of a highest rate."""

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
    host: HostUncertainty = HostUncertainty.SIMULATED
    """How the prediction holds the doubt of a borrowed host."""

    @property
    def deployment(self) -> Deployment:
        """What serves."""
        return self.candidate.deployment

    @property
    def config(self) -> EngineConfig:
        """What the engine of each server is told."""
        return self.candidate.config

    @property
    def expected_gpus(self) -> float:
        """GPUs as they count: more for a loss of quality, and for an SLO that may not hold."""
        gpus = weighted_gpus(self.deployment.num_gpus, self.candidate.quality)
        probability = self.prediction.probability
        return gpus / probability if probability > 0 else math.inf

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
        if self._takes_other_gpus(other):
            return self.expected_gpus < other.expected_gpus
        gain = self.expected - other.expected
        least = LEAST_GAIN * abs(other.expected)
        return gain > least or (gain >= -least and self.candidate.score > other.candidate.score)

    def _takes_other_gpus(self, other: Finalist) -> bool:
        """Whether the number of GPUs decides between the two."""
        return (
            self.candidate.prefers_fewer_gpus
            and self.deployment.num_gpus != other.deployment.num_gpus
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the simulation has decided."""

    winner: Finalist
    others: tuple[Finalist, ...]
    """Everything else that was simulated."""
    rate_per_s: float
    """Highest rate of the winner under the SLO."""


def best_of_each_split(found: SearchResult) -> list[Candidate]:
    """Return the best candidate, and the best of each other way to split and store the model."""
    by_split: dict[tuple[Any, ...], Candidate] = {}
    for candidate in found.candidates:
        by_split.setdefault(split_of(candidate.config), candidate)
    return list(by_split.values())[:MOST_FINALISTS]


def decide(
    space: SearchSpace,
    evaluator: Evaluator,
    finalists: list[Candidate],
    *,
    objective: str,
    demand: Demand,
    stopped: Callable[[], bool] | None = None,
) -> Decision:
    """Return what was simulated, and which of it is to be recommended.

    Args:
        space: What may be chosen.
        evaluator: Model, GPU, calibration, load and SLO.
        finalists: Best first, by the closed form.
        objective: What is maximised.
        demand: Requests to simulate.
        stopped: Asked before each further simulation; once true, the best so far wins.
    """
    return _Deciding(space, evaluator, objective, demand, stopped).run(finalists)


class _Deciding:
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
        self.simulated: dict[Deployment, Finalist] = {}
        self.rates: dict[Deployment, float] = {}

    def run(self, finalists: list[Candidate]) -> Decision:
        best = self._simulate(finalists[0])
        best = self._sure(best) if self.evaluator.slo else best
        if self._is_contested(best.prediction) or best.deployment.num_servers > 1:
            for candidate in finalists[1:]:
                if best.prediction.feasible and not _may_catch_up(candidate, finalists[0], best):
                    continue
                if self._has_had_enough():
                    break
                best = self._better(best, self._simulate(candidate))
        best = self._enough_servers(best)
        if self._is_contested(best.prediction) and not self._is_rated(best):
            best = self._speculate(self._climb(best))
        else:
            best = self._run_off(self._speculate(best))
        best = self._sure(self._simplified(best))
        others = tuple(one for one in self.simulated.values() if one is not best)
        rate_per_s = best.prediction.highest_rate_per_s if self.stopped() else self.rate_of(best)
        return Decision(winner=best, others=others, rate_per_s=rate_per_s)

    def _is_rated(self, best: Finalist) -> bool:
        """Whether highest rates compare better than one load does: that of several servers."""
        is_open = self.demand.protocol is ArrivalMode.OPEN_LOOP
        return is_open and best.prediction.feasible and best.deployment.num_servers > 1

    def _enough_servers(self, best: Finalist) -> Finalist:
        """Return the same servers in the fewest that keep the SLO at the load, as simulated."""
        if self.stopped():
            return best
        if self.demand.protocol is ArrivalMode.OPEN_LOOP:
            return self._as_many_as_the_rate_needs(best)
        return self._fewer_or_more(best)

    def _as_many_as_the_rate_needs(self, best: Finalist) -> Finalist:
        """Divide the arriving rate by what one of the servers takes."""
        counts = self.space.server_counts(best.config)
        offered_per_s = self.demand.arriving_per_s
        for _ in range(MOST_COUNTS):
            taken_per_s = self.rate_of(best) / best.deployment.num_servers
            enough = [n for n in counts if n * taken_per_s >= offered_per_s]
            wanted = min(enough, default=counts[-1])
            if wanted == best.deployment.num_servers or not taken_per_s or self.stopped():
                break
            changed = best.deployment.with_knobs(num_servers=wanted)
            best = self.simulated.get(changed) or self._simulate(self._candidate(changed))
        return best if best.prediction.feasible else self._fewer_or_more(best)

    def _fewer_or_more(self, best: Finalist) -> Finalist:
        """Take servers away one by one while the SLO holds, or add them until it does."""
        counts = list(self.space.server_counts(best.config))
        place, step = counts.index(best.deployment.num_servers), -1
        if not best.prediction.feasible:
            step = 1
        while 0 <= place + step < len(counts) and not self._has_had_enough():
            place += step
            changed = best.deployment.with_knobs(num_servers=counts[place])
            other = self.simulated.get(changed) or self._simulate(self._candidate(changed))
            if step < 0 and not other.beats(best):
                break
            best = other if other.beats(best) else best
            if step > 0 and best.prediction.feasible:
                break
        return best

    def rate_of(self, one: Finalist) -> float:
        """Return the highest rate under the SLO, simulated once."""
        if one.deployment not in self.rates:
            found = highest_rate(self.evaluator, one.deployment, self.demand)
            self.rates[one.deployment] = found.rate_per_s
        return self.rates[one.deployment]

    def _run_off(self, best: Finalist) -> Finalist:
        """Compare near equals by the highest rate that the simulation finds for each."""
        if self.objective not in RATED or self.demand.protocol is not ArrivalMode.OPEN_LOOP:
            return best
        near = (1 - RUN_OFF) * best.candidate.score
        rivals = [
            one
            for one in self.simulated.values()
            if one.prediction.feasible
            and one.deployment != best.deployment
            and one.deployment.num_gpus == best.deployment.num_gpus
            and one.candidate.score >= near
        ]
        rivals.sort(key=lambda one: -one.candidate.score)
        for rival in rivals[:MOST_RIVALS]:
            if not self.stopped() and self._rated(rival) > self._rated(best) * (1 + RATE_ERROR):
                best = rival
        return best

    def _simplified(self, best: Finalist) -> Finalist:
        """Return what is worth as much with fewer knobs away from the default, if simulated so."""
        plainer = simplified(best.deployment, self.space, self.evaluator)
        if plainer == best.deployment or self.stopped():
            return best
        # Both with every doubt: it makes limits less likely to hold.
        best = self._sure(best)
        other = self._sure(self.simulated.get(plainer) or self._simulate(self._candidate(plainer)))
        keeps = other.prediction.feasible == best.prediction.feasible
        worth = other.expected >= best.expected - LEAST_GAIN * abs(best.expected)
        return other if keeps and worth else best

    def _rated(self, one: Finalist) -> float:
        score = handicapped(self.rate_of(one), one.candidate.quality)
        return expected(score * (1 - one.doubt), one.prediction.probability)

    def _is_contested(self, prediction: Prediction) -> bool:
        """Whether queues may decide: a closed loop, or an open one near a limit or in doubt."""
        if self.demand.protocol is not ArrivalMode.OPEN_LOOP or not prediction.feasible:
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
                for changed in self._beside(best.deployment, knob, STRIDES[place]):
                    if self._has_had_enough():
                        return best
                    best = self._better(best, self._simulate(self._candidate(changed)))
            place = place + 1 if best is before else 0
        return best

    def _speculate(self, best: Finalist) -> Finalist:
        """Draft on top of the winner where the closed form sees a gain beyond its doubt."""
        plain = self._candidate(best.deployment)
        tried = [
            self._candidate(best.deployment.with_config(config))
            for config in self.space.speculating(best.config)
        ]
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
        hosts = self.evaluator.hosts() if one.host is HostUncertainty.SIMULATED else ()
        return (1 + len(hosts)) * (run.num_steps + STEPS_PER_REQUEST * run.num_requests)

    def _beside(self, deployment: Deployment, knob: str, stride: int) -> Iterator[Deployment]:
        """Yield the deployments that differ by one stride of a knob and were not simulated."""
        choices, current = self.space.choices(knob), deployment.knob(knob)
        if knob == "max_batch_size" and self.demand.concurrency:
            # Batches beyond the clients are all alike: the next smaller one that matters.
            wide = [value for value in choices if value >= self.demand.concurrency]
            current = min([current, *wide])
        for value in neighbouring(choices, current, stride=stride):
            changed = self.space.legal(deployment, **{knob: value})
            if changed is not None and changed not in self.simulated:
                yield changed

    def _candidate(self, deployment: Deployment) -> Candidate:
        return evaluated(
            deployment,
            self.evaluator,
            objective=self.objective,
            prefers_fewer_gpus=not self.space.use_all,
        )

    def _simulate(self, candidate: Candidate) -> Finalist:
        """Predict a candidate; the doubt of its host only where it decides what is feasible."""
        host = HostUncertainty.SIMULATED if self.evaluator.risk else HostUncertainty.LEFT_OUT
        one = Finalist(
            candidate=candidate,
            prediction=predict_deployment(
                self.evaluator, candidate.deployment, self.demand, host=host, whole_fleet=False
            ),
            objective=self.objective,
            doubt=self._doubt(candidate.config),
            host=host,
        )
        self.simulated[candidate.deployment] = one
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
        how = HostUncertainty.CLOSED_FORM if self.stopped() else HostUncertainty.SIMULATED
        sure = with_host_uncertainty(one, self.evaluator, self.demand, how)
        self.simulated[one.deployment] = sure
        return sure


def with_host_uncertainty(
    one: Finalist, evaluator: Evaluator, demand: Demand, how: HostUncertainty
) -> Finalist:
    """Return the same with the doubt of a borrowed host, where it was left out so far."""
    if one.host is not HostUncertainty.LEFT_OUT or not evaluator.hosts():
        return one
    simulation = one.prediction.simulation
    prediction = predict_deployment(
        evaluator, one.deployment, demand, host=how, simulation=simulation
    )
    return replace(one, prediction=prediction, host=how)


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
    num_gpus = other.deployment.num_gpus
    if other.prefers_fewer_gpus and num_gpus != best.deployment.num_gpus:
        return weighted_gpus(num_gpus, other.quality) < best.expected_gpus
    hoped = expected(first.score, best.prediction.probability)
    return other.score >= hoped - (1 - WORTH_SIMULATING) * abs(hoped)


def split_of(config: EngineConfig) -> tuple[Any, ...]:
    """Return what decides how a model is split and stored."""
    return tuple(getattr(config, knob) for knob in OUTER_KNOBS)
