"""Screens the grid in closed form, then lets Optuna refine around the best."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from planner.prediction.evaluator import Evaluation, Evaluator, Slice
from planner.prediction.feasibility import violation
from planner.quality import QualityLoss
from planner.search.objective import handicapped, score
from planner.search.space import OUTER_KNOBS, SearchSpace

FloatArray = NDArray[np.float64]

KEPT_PER_SPLIT = 4
"""Best rows of each split that are remembered."""

ENUMERATED = 20_000
"""Spaces up to this size are evaluated whole."""

SEEDS = 16
"""Screened configurations from which Optuna starts."""

POPULATION = 24

REFINED_KNOBS = (
    "max_batch_size",
    "max_num_tokens",
    "tokens_per_block",
    "free_gpu_memory_fraction",
    "enable_chunked_prefill",
    "capacity_scheduler_policy",
    "stream_interval",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One evaluated deployment."""

    deployment: Deployment
    score: float
    """Objective less the quality handicap; larger is better."""
    raw_score: float
    violation: float
    """0 when feasible."""
    tok_per_s_per_gpu: float
    """Output tokens/s per GPU with every slot taken."""
    tok_per_s_per_user: float
    quality: QualityLoss
    prefers_fewer_gpus: bool = True
    """Whether the fewest GPUs that are feasible come first, and the objective after that."""

    @property
    def config(self) -> EngineConfig:
        """What the engine of each server is told."""
        return self.deployment.config

    @property
    def feasible(self) -> bool:
        """Whether it fits, takes every prompt and meets the SLO."""
        return self.violation <= 0

    @property
    def score_per_gpu(self) -> float:
        """The objective per GPU, where it is one that grows with them; else the objective."""
        return self.score / self.deployment.num_gpus if self.score > 0 else self.score

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Sort key: feasible ones by GPUs, then score, the others by how near they are."""
        if not self.feasible:
            return (False, -self.violation, self.score)
        return (True, -self.deployment.num_gpus if self.prefers_fewer_gpus else 0, self.score)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How long and how to search."""

    objective: str = "goodput"
    trials: int = 120
    time_budget_s: float = 10.0
    seed: int = 0
    storage: str = ""
    """Optuna storage URL; empty keeps the study in memory."""
    study_name: str = "plan"
    progress: Callable[[int, int], None] | None = None
    """Called with (done, in all) as the search goes on, in splits screened and trials."""
    on_best: Callable[[Candidate], None] | None = None
    """Called with every candidate that beats all before it."""
    stopped: Callable[[], bool] | None = None
    """Asked now and then; once true, the search returns what it has found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found, best first."""

    candidates: tuple[Candidate, ...]
    pareto: tuple[Candidate, ...]
    """Feasible, none better in tokens/s per GPU, per-user speed and quality together."""
    num_evaluated: int
    wall_s: float
    seed: int

    @property
    def fastest(self) -> tuple[Candidate, ...]:
        """The part of the front that nothing beats in speed, whatever its quality.

        From most tokens/s per GPU to most tokens/s per user: a curve that can be drawn.
        """
        return tuple(_fast_front(list(self.pareto)))

    @property
    def best(self) -> Candidate:
        """The best feasible candidate, or the nearest to feasible."""
        return self.candidates[0]


def search(space: SearchSpace, evaluator: Evaluator, options: SearchOptions) -> SearchResult:
    """Return the best configurations of a space; the same seed gives the same result."""
    return _Search(space, evaluator, options).run()


class _Search:
    def __init__(self, space: SearchSpace, evaluator: Evaluator, options: SearchOptions) -> None:
        self.space, self.evaluator, self.options = space, evaluator, options
        self.started = time.monotonic()
        self.found: dict[Deployment, Candidate] = {}
        self.num_evaluated = 0
        self.done = 0
        self.in_all = 0
        """Splits and trials; counted only where somebody watches."""
        self.best: Candidate | None = None
        self.choices = {
            knob: self._refined_choices(knob) for knob in (*OUTER_KNOBS, *REFINED_KNOBS)
        }
        # Opened before anything is computed: a wrong URL is told at once.
        self.storage = self._storage()

    def run(self) -> SearchResult:
        complete = self.space.size() <= ENUMERATED and bool(self.space.limits)
        if self.options.progress is not None:
            trials = 0 if complete else self.options.trials
            self.in_all = sum(1 for _ in self.space.splits()) + trials
        for rows in self.space.screen(every_inner_knob=complete):
            self._keep_best(rows)
            if self._out_of_time():
                break
        if self.found and not complete and self.options.trials and not self._is_stopped():
            self._refine()
        ordered = sorted(self.found.values(), key=lambda c: c.rank, reverse=True)
        return SearchResult(
            candidates=tuple(ordered),
            pareto=pareto_front(ordered),
            num_evaluated=self.num_evaluated,
            wall_s=time.monotonic() - self.started,
            seed=self.options.seed,
        )

    def _keep_best(self, rows: Slice) -> None:
        """Remember the best rows of a slice, and those that lead in speed or throughput."""
        if not len(rows):
            return
        scored = self._scored(rows)
        kept = dict.fromkeys([*scored.order()[:KEPT_PER_SPLIT], *_leaders(scored)])
        for row in kept:
            candidate = scored.candidate(row)
            self.found[candidate.deployment] = candidate
            self._report_best(candidate)
        self._report()

    def _refine(self) -> None:
        """NSGA-II over the conditional space, seeded with the screen's best."""
        import optuna  # noqa: PLC0415  0.3 s that showing help need not pay

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=self.options.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                directions=["maximize", "maximize"],
                sampler=sampler,
                storage=self.storage,
                study_name=self.options.study_name if self.options.storage else None,
                load_if_exists=bool(self.options.storage),
            )
            for candidate in self._seeds():
                study.enqueue_trial(self._parameters(candidate.config), skip_if_exists=True)
            remaining = self.options.time_budget_s - (time.monotonic() - self.started)
            study.optimize(self._trial, n_trials=self.options.trials, timeout=max(remaining, 0.1))

    def _storage(self) -> Any:
        """Open the study's storage; None keeps it in memory."""
        if not self.options.storage:
            return None
        from planner.search.storage import open_storage, storage_errors  # noqa: PLC0415

        with storage_errors("--storage", self.options.storage):
            return open_storage(self.options.storage)

    def _seeds(self) -> list[Candidate]:
        ordered = sorted(self.found.values(), key=lambda c: c.rank, reverse=True)
        return ordered[:SEEDS]

    def _parameters(self, config: EngineConfig) -> dict[str, Any]:
        return {knob: getattr(config, knob) for knob in self.choices}

    def _trial(self, trial: Any) -> tuple[float, float]:
        """Evaluate one suggestion; what is illegal or infeasible is a constraint, not an error."""
        if self._is_stopped():
            trial.study.stop()
        # A knob with one choice is not suggested: each suggestion costs Optuna 0.2 ms.
        values = {
            knob: trial.suggest_categorical(knob, choices) if len(choices) > 1 else choices[0]
            for knob, choices in self.choices.items()
        }
        config = self.space.with_knobs(self.space.base, **values).config
        problems = len(
            self.space.rules.violations(config, model=self.space.model, gpu=self.space.gpu)
        )
        counts = self.space.server_counts(config)
        trial.set_constraint("deployable", float(problems + (not counts)))
        if problems or not counts:
            return -1e12, 0.0
        candidate = self._evaluated(config)
        trial.set_constraint("feasible", candidate.violation)
        self._report()
        # What a server is worth: how many of them a load takes is counted, not searched.
        return candidate.score_per_gpu, candidate.tok_per_s_per_user

    def _refined_choices(self, knob: str) -> tuple[Any, ...]:
        """Values between the screen's grid points, where the user has not limited the knob."""
        choices = self.space.choices(knob)
        if knob in self.space.limits or knob not in ("max_batch_size", "max_num_tokens"):
            return choices
        between = [round((a * b) ** 0.5 / 8) * 8 for a, b in itertools.pairwise(choices)]
        return tuple(sorted({*choices, *between}))

    def _scored(self, rows: Slice) -> Scored:
        self.num_evaluated += len(rows)
        objective, prefers = self.options.objective, not self.space.use_all
        return Scored.of(rows, self.evaluator, objective=objective, prefers_fewer_gpus=prefers)

    def _evaluated(self, config: EngineConfig) -> Candidate:
        """Return a configuration with the best number of servers."""
        scored = self._scored(self.space.deployments(config))
        candidate = scored.candidate(scored.order()[0])
        self.found.setdefault(candidate.deployment, candidate)
        self._report_best(candidate)
        return candidate

    def _out_of_time(self) -> bool:
        return self._is_stopped() or (time.monotonic() - self.started > self.options.time_budget_s)

    def _is_stopped(self) -> bool:
        return self.options.stopped is not None and self.options.stopped()

    def _report_best(self, candidate: Candidate) -> None:
        if self.best is None or candidate.rank > self.best.rank:
            self.best = candidate
            if self.options.on_best is not None:
                self.options.on_best(candidate)

    def _report(self) -> None:
        self.done += 1
        if self.options.progress is not None:
            self.options.progress(self.done, self.in_all)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """The rows of a slice as the search judges them."""

    rows: Slice
    evaluation: Evaluation
    score: FloatArray
    """Objective less the quality handicap; larger is better."""
    raw_score: FloatArray
    violation: FloatArray
    quality: QualityLoss
    prefers_fewer_gpus: bool

    @classmethod
    def of(
        cls, rows: Slice, evaluator: Evaluator, *, objective: str, prefers_fewer_gpus: bool
    ) -> Scored:
        """Evaluate the rows of a slice and judge them by an objective."""
        evaluation = evaluator.evaluate(rows)
        memory = evaluation.memory
        quality = evaluator.quality_of(rows.base.config)
        usd = evaluator.gpu.usd_per_hour
        raw = score(objective, rows, evaluation, load=evaluator.load, usd_per_hour=usd)
        return cls(
            rows=rows,
            evaluation=evaluation,
            score=handicapped(raw, quality),
            raw_score=raw,
            violation=violation(
                shortfall=memory.shortfall_bytes / memory.total_bytes,
                refused_share=evaluation.refused_share,
                excess=evaluation.slo_excess,
            ),
            quality=quality,
            prefers_fewer_gpus=prefers_fewer_gpus,
        )

    def order(self) -> list[int]:
        """Return the rows by `Candidate.rank`, the best first."""
        broken = self.violation > 0
        gpus = self.rows.num_gpus if self.prefers_fewer_gpus else np.zeros(len(self.rows))
        first = np.where(broken, self.violation, gpus)
        order: list[int] = np.lexsort((-self.score, first, broken)).tolist()
        return order

    def candidate(self, row: int) -> Candidate:
        """Return one row as a candidate."""
        return Candidate(
            deployment=self.rows.deployment(row),
            score=float(self.score[row]),
            raw_score=float(self.raw_score[row]),
            violation=float(self.violation[row]),
            tok_per_s_per_gpu=float(self.evaluation.saturated_tok_per_s_per_gpu[row]),
            tok_per_s_per_user=float(self.evaluation.saturated_tok_per_s_per_user[row]),
            quality=self.quality,
            prefers_fewer_gpus=self.prefers_fewer_gpus,
        )


def evaluated(
    deployment: Deployment, evaluator: Evaluator, *, objective: str, prefers_fewer_gpus: bool = True
) -> Candidate:
    """Return one deployment as a candidate."""
    rows = Slice(base=deployment)
    return Scored.of(
        rows, evaluator, objective=objective, prefers_fewer_gpus=prefers_fewer_gpus
    ).candidate(0)


def _leaders(scored: Scored) -> list[int]:
    """Feasible rows that no other row of the slice beats in throughput and per-user speed."""
    evaluation = scored.evaluation
    throughput = np.where(scored.violation > 0, -np.inf, evaluation.saturated_tok_per_s_per_gpu)
    speed = evaluation.saturated_tok_per_s_per_user
    leaders: list[int] = []
    fastest = -np.inf
    # Of numbers of servers that are alike in both, the fewest leads.
    for row in np.lexsort((scored.rows.num_gpus, -speed, -throughput)).tolist():
        if throughput[row] == -np.inf or len(leaders) == KEPT_PER_SPLIT:
            break
        if speed[row] > fastest:
            leaders.append(row)
            fastest = speed[row]
    return leaders


def pareto_front(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    """Return the feasible candidates that no other beats in throughput, user speed and quality.

    Candidates lose one of a few amounts of quality: those of each amount must stand against the
    front of all that lose no more.
    """
    feasible = sorted((c for c in candidates if c.feasible), key=lambda c: c.quality.loss_pct)
    standing: list[Candidate] = []
    front: list[Candidate] = []
    for _, alike in itertools.groupby(feasible, key=lambda c: c.quality.loss_pct):
        newcomers = list(alike)
        standing = _fast_front([*standing, *newcomers])
        entered = {id(c) for c in newcomers}
        front += [c for c in standing if id(c) in entered]
    return tuple(sorted(front, key=lambda c: c.tok_per_s_per_gpu, reverse=True))


def _fast_front(candidates: list[Candidate]) -> list[Candidate]:
    """Return those that no other beats in both throughput and per-user speed."""
    front: list[Candidate] = []
    for candidate in sorted(
        candidates, key=lambda c: (c.tok_per_s_per_gpu, c.tok_per_s_per_user), reverse=True
    ):
        if not front or candidate.tok_per_s_per_user > front[-1].tok_per_s_per_user:
            front.append(candidate)
    return front
