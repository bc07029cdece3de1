"""The use case `ladder`: every step predicted or measured, judged, and set beside the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError, PlannerError
from planner.ladder.bench import Bench
from planner.ladder.quality import Judge
from planner.ladder.request import LadderRequest
from planner.ladder.rungs import RUNGS, UNQUANTIZED, Rung, config_of, scheme_of
from planner.plans.make import plan_problem
from planner.prediction.predict import (
    HostUncertainty,
    Prediction,
    engine_config_to_json,
    predict_deployment,
)
from planner.quality import QualityLoss
from planner.quality.files import load_quality
from planner.question import PlanRequest, Problem, check_runnable, load_problem
from planner.workloads.demand import Demand, workload_demand

SHOWN = (
    "weight_bytes_per_gpu", "kv_cache_tokens", "ttft_ms.mean", "tpot_ms.mean", "e2el_ms.mean",
    "output_tok_per_s",
)  # fmt: skip
"""Metrics of the table."""

WHOLE_REQUEST = "e2el_ms.mean"
"""What steps are compared by: under an open loop below capacity all have the same output rate."""


LOWER_BOUND = "a lower bound: what Python does between kernels is not in it"
"""Of the times of a baseline that is only predicted."""


class Origin(StrEnum):
    """Where a number comes from."""

    PREDICTED = "predicted"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a step."""

    value: float
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one rung came to."""

    rung: Rung
    config: EngineConfig
    engine: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """By metric; empty where the step cannot even be computed."""
    loss: QualityLoss | None = None
    """Judged, or as published; None where the step is not computed."""
    over_limit: bool = False
    checkpoint: str = ""
    notes: tuple[str, ...] = ()
    is_usable: bool = True
    """Whether it fits, the engine takes it, and it keeps the limit."""

    def value(self, metric: str) -> float:
        """Return a metric's number."""
        return self.figures[metric].value


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """All steps, and the one to stay on."""

    model: str
    gpu: str
    workload: str
    steps: tuple[Step, ...]
    stopped_because: str = ""

    @property
    def best(self) -> Step | None:
        """The usable step whose requests take the least time."""
        return fastest(self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        best = self.best
        return {
            "model": self.model,
            "gpu": self.gpu,
            "workload": self.workload,
            "steps": [_step_json(step) for step in self.steps],
            "best": best.rung.name if best else None,
            "stopped_because": self.stopped_because or None,
        }


def fastest(steps: Iterable[Step]) -> Step | None:
    """Return the usable step whose requests take the least time; None where none is usable."""
    usable = (step for step in steps if step.is_usable)
    return min(usable, key=lambda step: step.value(WHOLE_REQUEST), default=None)


def ladder(request: LadderRequest, problem: Problem | None = None) -> Ladder:
    """Take a model down the ladder and return every step beside the others.

    A step is measured where its engine and the GPU are here, built where a checkpoint with weights
    and text to calibrate on are given, and predicted elsewhere. The KV cache is quantized on top
    of the best weights.

    Args:
        request: What to try, and how.
        problem: What the request names, loaded already, perhaps under another load.

    Raises:
        PlannerError: Wrong input. A step that fails or does not fit is an answer.
    """
    if problem is None:
        problem = load_problem(
            gpu=request.gpu, workload=request.workload, model=request.model, engine=request.backend
        )
    return _Climb(request, problem).run()


class _Climb:
    """One walk down the ladder."""

    def __init__(self, request: LadderRequest, problem: Problem) -> None:
        self.request, self.problem = request, problem
        self.say = request.progress or (lambda _what: None)
        self.demand: Demand = workload_demand(problem.workload, seed=request.seed)
        self.judge = Judge(request)
        self.expected = load_quality(problem.model)
        self.bench = Bench(request)
        self.steps: list[Step] = []
        self.base = self._base_config()

    def run(self) -> Ladder:
        """Take every step, or stop at the limit."""
        stopped = ""
        for rung in RUNGS:
            if stopped and not rung.quantizes_kv:
                continue
            self.say(f"step {rung.name}")
            step = self._step(rung)
            self.steps.append(step)
            if step.over_limit and not stopped:
                stopped = (
                    f"{rung.title} loses more than {self.request.max_quality_loss_pct:g} %: "
                    "coarser weights are not tried"
                )
        return Ladder(
            model=self.problem.model.name,
            gpu=self.problem.gpu.name,
            workload=self.problem.workload.name,
            steps=tuple(self.steps),
            stopped_because=stopped,
        )

    def _base_config(self) -> EngineConfig:
        """Return what `plan` recommends in BF16: every step but its precision is the same."""
        request = PlanRequest(
            gpu=self.request.gpu,
            workload=self.request.workload,
            model=self.request.model,
            engine=self.request.backend,
            pins={"quantization": UNQUANTIZED, "kv_cache_dtype": UNQUANTIZED},
            seed=self.request.seed,
        )
        return plan_problem(self.problem, request).recommended.config

    def _step(self, rung: Rung) -> Step:
        below = self._best_weights() if rung.quantizes_kv else None
        scheme = scheme_of(rung, self.problem.rules)
        quantization = scheme.quantization if scheme else UNQUANTIZED
        if below is not None:
            quantization = below.config.quantization
        config = config_of(rung, self.base, quantization=quantization)
        step = self._predicted(rung, config)
        if not step.figures:
            return step
        step = self._built_and_judged(step, scheme.name if scheme else "", below)
        return self._measured(step)

    def _best_weights(self) -> Step | None:
        return fastest(step for step in self.steps if not step.rung.is_baseline)

    def _predicted(self, rung: Rung, config: EngineConfig) -> Step:
        engine = "transformers" if rung.is_baseline else self.problem.rules.name
        step = Step(rung=rung, config=config, engine=engine)
        try:
            notes = [] if rung.is_baseline else _deployment_notes(self.problem, config)
        except ConfigError as error:
            return replace(step, notes=(error.message,), is_usable=False)
        prediction = predict_deployment(
            self.problem.evaluator,
            self.problem.deployment_of(config),
            self.demand,
            host=HostUncertainty.LEFT_OUT,
        )
        if not prediction.fits:
            notes.append(_shortfall(prediction))
        usable = not notes
        if rung.is_baseline and usable:
            notes.append(LOWER_BOUND)
        names = SHOWN if prediction.fits else SHOWN[:1]
        figures = {
            name: Figure(value=prediction.value(name), origin=Origin.PREDICTED) for name in names
        }
        return replace(step, figures=figures, notes=tuple(notes), is_usable=usable)

    def _built_and_judged(self, step: Step, scheme: str, below: Step | None) -> Step:
        """Return the step with its checkpoint and its loss, where either can be had."""
        try:
            made = self.judge.checkpoint(scheme, below.checkpoint if below else "")
            loss = self.judge.loss(made, config=step.config, expected=self.expected)
        except PlannerError as error:
            note = f"not built: {error}"
            return replace(step, notes=(*step.notes, note), is_usable=False)
        limit = self.request.max_quality_loss_pct
        over = limit is not None and loss.loss_pct > limit
        return replace(
            step,
            checkpoint=made,
            loss=loss,
            over_limit=over,
            is_usable=step.is_usable and not over,
        )

    def _measured(self, step: Step) -> Step:
        """Return the step with what its engine did here, where it is here."""
        if self.request.predict_only or not step.is_usable or not self.bench.can_run(step.rung):
            return step
        self.say(f"measuring {step.rung.name}")
        measured, problem = self.bench.measured(step.rung, step.config, step.checkpoint)
        figures = dict(step.figures) | {
            name: Figure(value=value, origin=Origin.MEASURED)
            for name, value in measured.items()
            if name in SHOWN
        }
        notes = tuple(n for n in step.notes if n != LOWER_BOUND) if measured else step.notes
        return replace(step, figures=figures, notes=(*notes, problem) if problem else notes)


def _deployment_notes(problem: Problem, config: EngineConfig) -> list[str]:
    """Return why an engine does not deploy a step.

    Raises:
        ConfigError: The GPU has no such arithmetic: nothing can be computed.
    """
    return [str(violation) for violation in check_runnable(problem, config)]


def _shortfall(prediction: Prediction) -> str:
    short = float(prediction.memory.shortfall_bytes) / 2**30
    return f"does not fit: {short:.2f} GiB short ({prediction.memory.binding})"


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.rung.name,
        "engine": step.engine,
        "config": engine_config_to_json(step.config),
        "figures": {
            name: {"value": float(f"{one.value:.6g}"), "origin": str(one.origin)}
            for name, one in step.figures.items()
        },
        "quality_loss_pct": step.loss.to_json() if step.loss else None,
        "over_limit": step.over_limit,
        "usable": step.is_usable,
        "checkpoint": step.checkpoint or None,
        "notes": list(step.notes),
    }
