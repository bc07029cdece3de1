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

from cost_models.engine import EngineConfig
from planner.prediction.evaluator import Evaluation, Evaluator, Slice
from planner.quality import QualityLoss
from planner.search.objective import handicapped, score, violation
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
    """One evaluated configuration."""

    config: EngineConfig
    score: float
    """Objective less the quality handicap; larger is better."""
    raw_score: float
    violation: float
    """0 when feasible."""
    tok_per_s_per_gpu: float
    """Output tokens/s per GPU with every slot taken."""
    tok_per_s_per_user: float
    quality: QualityLoss

    @property
    def feasible(self) -> bool:
        """Whether it fits, takes every prompt and meets the SLO."""
        return self.violation <= 0

    @property
    def rank(self) -> tuple[bool, float]:
        """Sort key: feasible ones by score, the others by how near they are."""
        return (self.feasible, self.score if self.feasible else -self.violation)


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
        self.found: dict[EngineConfig, Candidate] = {}
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
        evaluation = self.evaluator.evaluate(rows)
        ranked, raw, broken = scores(
            rows, evaluation, self.evaluator, objective=self.options.objective
        )
        self.num_evaluated += len(rows)
        order = np.lexsort((-np.where(broken > 0, -broken, ranked), broken > 0))
        kept = dict.fromkeys([*order[:KEPT_PER_SPLIT].tolist(), *_leaders(evaluation, broken)])
        for row in kept:
            scores_of_row = (ranked[row], raw[row], broken[row])
            quality = self.evaluator.quality_of(rows.base)
            candidate = _candidate(rows, evaluation, row, scores_of_row, quality)
            self.found[candidate.config] = candidate
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
        config = self.space.with_knobs(self.space.base, **values)
        problems = len(
            self.space.rules.violations(config, model=self.space.model, gpu=self.space.gpu)
        )
        problems += max(config.num_gpus - self.space.num_gpus, 0)
        trial.set_constraint("deployable", float(problems))
        if problems:
            return -1e12, 0.0
        candidate = self._evaluated(config)
        trial.set_constraint("feasible", candidate.violation)
        self._report()
        return candidate.score, candidate.tok_per_s_per_user

    def _refined_choices(self, knob: str) -> tuple[Any, ...]:
        """Values between the screen's grid points, where the user has not limited the knob."""
        choices = self.space.choices(knob)
        if knob in self.space.limits or knob not in ("max_batch_size", "max_num_tokens"):
            return choices
        between = [round((a * b) ** 0.5 / 8) * 8 for a, b in itertools.pairwise(choices)]
        return tuple(sorted({*choices, *between}))

    def _evaluated(self, config: EngineConfig) -> Candidate:
        if config not in self.found:
            self.found[config] = evaluated(config, self.evaluator, self.options.objective)
            self._report_best(self.found[config])
        self.num_evaluated += 1
        return self.found[config]

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


def evaluated(config: EngineConfig, evaluator: Evaluator, objective: str) -> Candidate:
    """Return one configuration as a candidate."""
    rows = Slice(base=config, columns={})
    evaluation = evaluator.evaluate(rows)
    columns = scores(rows, evaluation, evaluator, objective=objective)
    ranked, raw, broken = (float(column[0]) for column in columns)
    quality = evaluator.quality_of(config)
    return _candidate(rows, evaluation, 0, (ranked, raw, broken), quality)


def scores(
    rows: Slice, evaluation: Evaluation, evaluator: Evaluator, *, objective: str
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the objective with and without the quality handicap, and the violation."""
    raw = score(
        objective,
        rows,
        evaluation,
        load=evaluator.load,
        usd_per_hour=evaluator.gpu.usd_per_hour,
    )
    return handicapped(raw, evaluator.quality_of(rows.base)), raw, violation(evaluation)


def _candidate(
    rows: Slice,
    evaluation: Evaluation,
    row: int,
    scores: tuple[float, ...],
    quality: QualityLoss,
) -> Candidate:
    ranked, raw, broken = scores
    return Candidate(
        config=rows.config(row),
        score=float(ranked),
        raw_score=float(raw),
        violation=float(broken),
        tok_per_s_per_gpu=float(evaluation.saturated_tok_per_s_per_gpu[row]),
        tok_per_s_per_user=float(evaluation.saturated_tok_per_s_per_user[row]),
        quality=quality,
    )


def _leaders(evaluation: Evaluation, broken: FloatArray) -> list[int]:
    """Feasible rows that no other row of the slice beats in throughput and per-user speed."""
    throughput = np.where(broken > 0, -np.inf, evaluation.saturated_tok_per_s_per_gpu)
    speed = evaluation.saturated_tok_per_s_per_user
    leaders: list[int] = []
    fastest = -np.inf
    for row in np.lexsort((-speed, -throughput)).tolist():
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
