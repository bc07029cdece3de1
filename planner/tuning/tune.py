"""Tuning on real hardware: an Optuna study whose sampler is the cost model.

Each trial is one candidate of the pool, measured by the executor and kept in the run store. The
study lives in the same database, so several hosts can work on it together and a study that was
interrupted goes on: a candidate that another host measures counts as measured with the expected
outcome, one whose host died is given out again.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from cost_models.errors import ConfigError, MeasurementError
from executor.backend import load_backend
from executor.case import Measurement
from executor.store import RunStore
from planner.measuring.measure import measure_request
from planner.measuring.request import MeasureRequest
from planner.plans.make import plan_problem
from planner.question import PlanRequest, changed_load, requested_problem
from planner.search.storage import open_storage, storage_errors
from planner.tuning.pool import SEARCH_S, make_pool, measured_log_score
from planner.tuning.sampler import CANDIDATE, FAILURE, ModelSampler, StudyState
from planner.workloads.demand import workload_demand
from planner.workloads.load import ArrivalMode
from planner.workloads.measured import flat_metrics

SMALLEST_GAIN = 0.01
"""Expected gain, as a share of the best score, below which tuning ends."""

HEARTBEAT_S = 10

RUN_IDS = "run_ids"
POOL_KEY = "pool"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What is tuned, on what, and for how long."""

    plan: PlanRequest
    measure: MeasureRequest
    """Its backend, store, repeats and time limits; configurations come from the plan."""
    study: str = "tune"
    """Hosts that name the same study in the same store share it."""
    time_budget_s: float = 1200.0
    smallest_gain: float = SMALLEST_GAIN
    heartbeat_s: int = HEARTBEAT_S
    said: Callable[[str], None] = field(default=lambda _line: None)
    """Told what is measured next, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One candidate that was measured, or failed."""

    index: int
    label: str
    config: Mapping[str, Any]
    predicted: float
    """Score; requests/s, tokens/s/GPU, or 1/ms for latency."""
    measured: float | None
    """None where it failed."""
    failure: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a study has found so far."""

    objective: str
    tried: tuple[Tried, ...]
    """In order of measuring."""
    best: Tried | None
    expected_gain: float
    """Of measuring on, as a share of the best score."""
    reason: str
    """Why tuning ended."""

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "objective": self.objective,
            "reason": self.reason,
            "expected_gain": round(self.expected_gain, 5),
            "best": _tried_to_json(self.best) if self.best else None,
            "tried": [_tried_to_json(tried) for tried in self.tried],
        }


def _tried_to_json(tried: Tried) -> dict[str, Any]:
    return {
        "label": tried.label,
        "config": dict(tried.config),
        "predicted": tried.predicted,
        "measured": tried.measured,
        "failure": tried.failure,
        "runs": list(tried.run_ids),
    }


def tune(request: TuneRequest) -> Tuned:
    """Measure the candidates that teach most until little is left to gain.

    Raises:
        PlannerError: Bad input, a store that does not answer, or a study of another question.
        KeyboardInterrupt: Interrupted; what was measured is kept, and the study goes on later.
    """
    state = load_backend(request.measure.backend).availability()
    if not state.can_run:
        raise MeasurementError(
            f"backend {request.measure.backend!r}: {state.problem}", hint=state.install
        )
    return _Tuning(request).run()


class _Tuning:
    def __init__(self, request: TuneRequest) -> None:
        self.problem = requested_problem(request.plan)
        self.objective = request.plan.objective or self.problem.workload.objective
        self.request = self._at_a_telling_rate(request)
        self.problem = changed_load(self.problem, rate_per_s=self.request.measure.rate_per_s)
        demand = workload_demand(self.problem.workload, seed=request.plan.seed)
        self.pool = make_pool(self.problem, request.plan, demand, objective=self.objective)
        self.until_s = time.monotonic() + request.time_budget_s
        with _quiet(), storage_errors("--store", request.measure.store):
            self.storage = open_storage(request.measure.store, heartbeat_s=request.heartbeat_s)
            self.study = self._opened_study()
        self.reason = "time budget spent"

    def _at_a_telling_rate(self, request: TuneRequest) -> TuneRequest:
        """Raise an open loop's rate to what the plan can just serve: below it all are alike."""
        load, rate_per_s = self.problem.evaluator.load, request.measure.rate_per_s
        is_open = load.protocol is ArrivalMode.OPEN_LOOP
        if rate_per_s is None and is_open and self.objective in ("goodput", "throughput"):
            # Ample time, so that slow hosts and fast ones find the same rate.
            asked = replace(request.plan, time_budget_s=SEARCH_S)
            highest = plan_problem(self.problem, asked).recommended.highest_rate_per_s
            rate_per_s = float(f"{highest:.3g}")
            request.said(
                f"measured at {rate_per_s:g} requests/s, the highest rate that the plan is "
                "predicted to serve under the SLO; --rate takes another"
            )
        return replace(request, measure=replace(request.measure, rate_per_s=rate_per_s))

    def run(self) -> Tuned:
        """Measure until the gain is small or the time is over."""
        try:
            with _quiet(), storage_errors("--store", self.request.measure.store):
                self.study.optimize(
                    self._measure,
                    timeout=max(self.until_s - time.monotonic(), 0.1),
                    catch=(_CandidateFailedError,),
                    callbacks=[self._stop_when_done],
                )
                return self._result()
        finally:
            self.storage.remove_session()
            self.storage.engine.dispose()

    def _opened_study(self) -> optuna.Study:
        study = optuna.create_study(
            direction="maximize",
            sampler=ModelSampler(self.pool),
            storage=self.storage,
            study_name=self.request.study,
            load_if_exists=True,
        )
        known, key = study.user_attrs.get(POOL_KEY), self._question_key()
        if known is None:
            study.set_user_attr(POOL_KEY, key)
        elif known != key:
            raise ConfigError(
                f"study {self.request.study!r} in {self.request.measure.store} is of another "
                "question or calibration",
                hint="give another --study",
            )
        return study

    def _question_key(self) -> str:
        """The same for hosts that ask the same of the same candidates."""
        plan, rate = self.request.plan, self.request.measure.rate_per_s
        asked = (plan.gpu, self.problem.workload.name, self.problem.model.name, plan.engine)
        return f"{self.pool.key} {self.objective} {rate} {sorted(self.problem.slo.items())} {asked}"

    def _measure(self, trial: Trial) -> float:
        """Measure one candidate; what fails says so in the study."""
        index = int(trial.suggest_categorical(CANDIDATE, range(len(self.pool.configs))))
        if self._is_taken(index, trial.number):
            trial.set_user_attr(FAILURE, "taken by another host")
            raise optuna.TrialPruned
        self.request.said(f"{self._progress_words()}; next: {self.label(index)}")
        request = replace(
            self.request.measure,
            configs=(self.pool.configs[index],),
            time_budget_s=max(self.until_s - time.monotonic(), 1.0),
        )
        measurements = measure_request(request)
        records = [record for m in measurements for record in m.records]
        trial.set_user_attr(RUN_IDS, [record["run_id"] for record in records])
        scores = self._log_scores(measurements)
        if not scores:
            failure = str(records[-1]["status"]) if records else "out_of_time"
            trial.set_user_attr(FAILURE, failure)
            raise _CandidateFailedError(failure)
        return median(scores)

    def _is_taken(self, index: int, number: int) -> bool:
        """Whether another host has the same candidate, chosen in the same moment.

        Each writes its choice before it looks, so that the later to write sees the other; where
        both do, both choose anew.
        """
        return any(
            other.number != number
            and other.state in (TrialState.RUNNING, TrialState.COMPLETE)
            and other.params.get(CANDIDATE) == index
            for other in self.study.get_trials(deepcopy=False)
        )

    def _log_scores(self, measurements: list[Measurement]) -> list[float]:
        scores = []
        with closing(RunStore(self.request.measure.store)) as store:
            for record in (r for m in measurements for r in m.records if r["status"] == "ok"):
                scores.append(
                    measured_log_score(
                        flat_metrics(record["measured"]),
                        store.run(record["run_id"]).requests(),
                        objective=self.objective,
                        slo=self.problem.slo,
                        num_gpus=int(record.get("num_gpus") or 1),
                    )
                )
        return scores

    def _stop_when_done(self, study: optuna.Study, _trial: FrozenTrial) -> None:
        state = StudyState.of(study, self.pool)
        if not state.gains.any():
            self.reason = "no other candidate can be the best"
            study.stop()
        elif state.expected_gain < self.request.smallest_gain and state.measured:
            self.reason = (
                f"measuring on is expected to gain {100 * state.expected_gain:.2f} %, less than "
                f"{100 * self.request.smallest_gain:g} %"
            )
            study.stop()

    def _progress_words(self) -> str:
        state = StudyState.of(self.study, self.pool)
        return f"{len(state.measured)} measured, gain to expect {100 * state.expected_gain:.1f} %"

    def label(self, index: int) -> str:
        """Name a candidate by what sets it apart."""
        config = self.pool.configs[index]
        words = {0: "plan's choice", self.pool.default: "engine's default"}.get(index, "")
        parts = [
            config.quantization, f"kv {config.kv_cache_dtype}", f"TP{config.tensor_parallel_size}",
            f"batch {config.max_batch_size}", f"tokens {config.max_num_tokens}",
            f"blocks {config.tokens_per_block}",
        ]  # fmt: skip
        return " ".join(parts) + (f" ({words})" if words else "")

    def _result(self) -> Tuned:
        ended = (TrialState.COMPLETE, TrialState.FAIL)
        trials = [t for t in self.study.trials if t.state in ended and CANDIDATE in t.params]
        tried = tuple(self._tried(trial) for trial in trials)
        measured = [one for one in tried if one.measured is not None]
        return Tuned(
            objective=self.objective,
            tried=tried,
            best=max(measured, key=lambda one: one.measured or 0.0, default=None),
            expected_gain=StudyState.of(self.study, self.pool).expected_gain,
            reason=self.reason,
        )

    def _tried(self, trial: FrozenTrial) -> Tried:
        index = int(trial.params[CANDIDATE])
        prediction = self.pool.predictions[index]
        return Tried(
            index=index,
            label=self.label(index),
            config=prediction.to_json()["config"],
            predicted=math.exp(self.pool.log_scores[index]),
            measured=None if trial.value is None else math.exp(trial.value),
            failure=str(trial.user_attrs.get(FAILURE, "" if trial.value is not None else "lost")),
            run_ids=tuple(trial.user_attrs.get(RUN_IDS, ())),
        )


class _CandidateFailedError(Exception):
    """A candidate could not be measured; its runs say why."""


@contextmanager
def _quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
