"""What a changed knob or load would do: the questions that a person asks of a plan.

A problem is loaded once; every answer here comes from its closed form, fast enough to
follow keystrokes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cost_models.deployment import ALL_KNOBS, ROUTERS, Deployment
from cost_models.engine_traits import MEMORY_KNOBS
from cost_models.errors import PlannerError
from planner.knobs import TYPES
from planner.plans.make import plan_problem
from planner.plans.plan import Plan
from planner.prediction.predict import Prediction, predict_deployment
from planner.quality import QUALITY_LOSS, QualityLoss
from planner.question import PlanRequest, Problem, predict_problem, search_space
from planner.search.space import DRAFTS

EXPERT_KNOBS = frozenset({"moe_expert_parallel_size", "moe_backend"})
"""Knobs without meaning for a model without experts."""

DERIVED_SIZES = (0.25, 0.5, 1, 2, 4)
"""Multiples of the present value that stand for a number without a list of values."""

DRAFT_LENGTHS = (0, 1, 2, 3, 4, 5, 7)
NGRAM_SIZES = (1, 2, 3, 4)

NO_DIFFERENCE = 0.005
"""Relative change below which two predictions are called the same."""

COMPARED: tuple[tuple[str, str, str, bool], ...] = (
    ("highest_rate_per_s", "highest rate under the SLO", "requests/s", True),
    ("output_tok_per_s_per_gpu", "output", "tokens/s/GPU", True),
    ("ttft_ms.p99", "P99 TTFT", "ms", False),
    ("tpot_ms.p99", "P99 TPOT", "ms", False),
    ("e2el_ms.p99", "P99 E2E", "ms", False),
    ("goodput_request_per_s", "goodput", "requests/s", True),
    ("usd_per_million_output_tokens", "cost", "USD/M output tokens", False),
    (QUALITY_LOSS, "expected quality loss", "%", False),
    ("kv_cache_tokens", "KV cache", "tokens", True),
)
"""(metric, what people call it, unit, whether more is better)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One metric before and after a change."""

    metric: str
    title: str
    unit: str
    before: float
    after: float
    is_better: bool | None
    """None where the two are the same."""
    is_over_slo: bool
    note: str = ""
    """How sure the value after the change is, where that is not a metric's interval."""

    @property
    def words(self) -> str:
        """The change as a person says it."""
        if self.is_better is None:
            text = f"{self.title}: no difference ({_plain(self.after)} {self.unit})"
        else:
            text = f"{self.title}: {_plain(self.before)} → {_plain(self.after)} {self.unit}"
            if self.before and self.unit != "%":
                text += f" ({100 * (self.after / self.before - 1):+.1f} %)"
        over = ", over the limit" if self.metric == QUALITY_LOSS else ", over the SLO"
        return f"{text}{self.note}{over if self.is_over_slo else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The prediction of a changed configuration, and why it could not be deployed."""

    base: Prediction
    """Of the unchanged one; both in closed form, so that they compare."""
    prediction: Prediction
    not_deployable: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityPoint:
    """One value of a knob, all others held."""

    value: Any
    prediction: Prediction | None
    """None where the value cannot be computed."""
    reason: str
    """Why it cannot be computed or deployed; empty when it can."""


def ask(problem: Problem, deployment: Deployment, settings: Mapping[str, str]) -> Answer:
    """Return what a deployment with changed knobs would do.

    Raises:
        ConfigError: A knob has a value that cannot be computed.
    """
    prediction, violations = predict_problem(problem, deployment, settings)
    return Answer(
        base=predict_deployment(problem.evaluator, deployment),
        prediction=prediction,
        not_deployable=tuple(str(v) for v in violations),
    )


def knobs_of(problem: Problem) -> tuple[str, ...]:
    """Return the knobs that mean something for a problem's model and engine."""
    absent = frozenset() if problem.model.is_moe else EXPERT_KNOBS
    read = problem.evaluator.calibration.traits.memory_knob
    absent = absent | frozenset(MEMORY_KNOBS) - {read}
    return tuple(knob for knob in ALL_KNOBS if knob not in absent)


def legal_values(
    problem: Problem, deployment: Deployment, knob: str, *, num_gpus: int
) -> tuple[Any, ...]:
    """Return the values that a control offers for a knob, the present one among them."""
    present = deployment.knob(knob)
    drafting = _drafting_values(problem, knob)
    if drafting:
        return drafting if present in drafting else _inserted(drafting, present)
    if TYPES[knob] == "bool":
        return (False, True)
    if knob in problem.rules.knobs:
        rule = problem.rules.knobs[knob]
        values = rule.mla_values if problem.model.uses_mla and rule.mla_values else rule.values
    elif knob in _searched(problem, num_gpus):
        values = _searched(problem, num_gpus)[knob]
    elif knob == "router":
        values = ROUTERS
    elif knob == "cuda_graph_max_batch_size":
        values = (0, *_searched(problem, num_gpus)["max_batch_size"])
    else:
        values = _around(present)
    return tuple(values) if present in values else _inserted(values, present)


def _drafting_values(problem: Problem, knob: str) -> tuple[Any, ...]:
    """Return what the knobs of speculation offer; nothing of other knobs."""
    offered = problem.rules.speculation
    values: dict[str, tuple[Any, ...]] = {
        "decoding_type": ("", *offered),
        "max_draft_len": DRAFT_LENGTHS,
        "max_matching_ngram_size": NGRAM_SIZES,
        "speculative_model": ("", *filter(None, [DRAFTS.get(problem.model.name)])),
    }
    return values.get(knob, ())


def sensitivity(
    problem: Problem, deployment: Deployment, knob: str, *, num_gpus: int
) -> tuple[SensitivityPoint, ...]:
    """Return what each value of one knob would do, all others held."""
    values = legal_values(problem, deployment, knob, num_gpus=num_gpus)
    return tuple(_sensitivity_point(problem, deployment, knob, value) for value in values)


def metric_value(prediction: Prediction, metric: str) -> float:
    """Return a compared metric of a prediction."""
    if metric == "highest_rate_per_s":
        return prediction.highest_rate_per_s
    return prediction.value(metric)


def differences(base: Prediction, changed: Prediction) -> tuple[Difference, ...]:
    """Return each compared metric before and after a change."""
    return tuple(
        _difference(base, changed, metric, title, unit, more_is_better)
        for metric, title, unit, more_is_better in COMPARED
    )


def plan_of(problem: Problem, deployment: Deployment, request: PlanRequest) -> Plan:
    """Return the plan that recommends just this deployment, with its neighbours.

    Raises:
        ConfigError: The engine cannot deploy it.
    """
    pins = {knob: str(deployment.knob(knob)) for knob in ALL_KNOBS}
    num_gpus = max(request.num_gpus, deployment.num_gpus)
    return plan_problem(problem, replace(request, pins=pins, limits={}, num_gpus=num_gpus))


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _searched(problem: Problem, num_gpus: int) -> Mapping[str, tuple[Any, ...]]:
    request = PlanRequest(gpu=problem.gpu.name, workload=problem.workload.name, num_gpus=num_gpus)
    space = search_space(problem, request)
    names = (
        "quantization", "kv_cache_dtype", "tensor_parallel_size", "pipeline_parallel_size",
        "num_servers", "moe_expert_parallel_size", "max_batch_size", "max_num_tokens",
        "free_gpu_memory_fraction",
    )  # fmt: skip
    return {name: space.choices(name) for name in names}


def _around(present: Any) -> tuple[Any, ...]:
    if not present:
        return (present,)
    kind = type(present)
    return tuple(dict.fromkeys(kind(present * share) or present for share in DERIVED_SIZES))


def _inserted(values: tuple[Any, ...], present: Any) -> tuple[Any, ...]:
    if isinstance(present, str):
        return (*values, present)
    return tuple(sorted((*values, present)))


def _sensitivity_point(
    problem: Problem, deployment: Deployment, knob: str, value: Any
) -> SensitivityPoint:
    try:
        answer = ask(problem, deployment, {knob: str(value)})
    except PlannerError as error:
        return SensitivityPoint(value=value, prediction=None, reason=str(error))
    reason = answer.not_deployable[0] if answer.not_deployable else ""
    return SensitivityPoint(value=value, prediction=answer.prediction, reason=reason)


def _difference(
    base: Prediction,
    changed: Prediction,
    metric: str,
    title: str,
    unit: str,
    more_is_better: bool,
) -> Difference:
    before, after = metric_value(base, metric), metric_value(changed, metric)
    same = abs(after - before) <= NO_DIFFERENCE * max(abs(before), abs(after))
    return Difference(
        metric=metric,
        title=title,
        unit=unit,
        before=before,
        after=after,
        is_better=None if same else (after > before) == more_is_better,
        is_over_slo=changed.slo_excess.get(metric, 0.0) > 0,
        note=_loss_note(changed.quality) if metric == QUALITY_LOSS else "",
    )


def _loss_note(quality: QualityLoss) -> str:
    """Return the interval of a loss and where it is from; nothing where nothing is rounded."""
    if not quality.sources:
        return ""
    low, high = quality.interval_90
    return f" ({low:.2f} to {high:.2f}, {quality.provenance})"
