"""The question that the form asks, as text, and what is wrong with it field by field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cost_models.errors import ConfigError, PlannerError

if TYPE_CHECKING:
    from planner.question import PlanRequest, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The fields of the form, as typed."""

    gpu: str = "h100_sxm"
    num_gpus: str = "1"
    workload: str = "chat"
    model: str = ""
    """Empty takes the workload's, as do the fields below."""
    rate: str = ""
    """Requests per second."""
    isl: str = ""
    """Mean prompt tokens."""
    osl: str = ""
    """Mean output tokens."""
    slo: str = ""
    """Limits as `metric=milliseconds`, parted by blanks."""
    max_quality_loss: str = ""
    """Percent that the precisions may be expected to lose; empty is no limit."""
    objective: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A question that was loaded, or what is wrong with its fields."""

    problem: Problem | None = None
    request: PlanRequest | None = None
    errors: dict[str, str] = field(default_factory=dict)
    """Words by field."""


def check(question: Question, *, calibration: str = "") -> Checked:
    """Load what a question names, under a calibration file of the user's own if there is one.

    It reads files: call it from a worker.
    """
    readers = _readers(question)
    values: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, reader in readers.items():
        try:
            values[name] = reader()
        except PlannerError as error:
            errors[name] = str(error)
        except (OSError, ValueError) as error:
            # A text that the file system cannot even take as a name.
            errors[name] = f"cannot be read: {getattr(error, 'strerror', '') or error}"
    if errors:
        return Checked(errors=errors)
    return _loaded(question, values, calibration)


def _readers(question: Question) -> dict[str, Callable[[], Any]]:
    from cost_models.profile_io import load_gpu, load_model  # noqa: PLC0415  first paint
    from planner.workloads.workload import load_workload  # noqa: PLC0415

    q = question
    return {
        "gpu": lambda: q.gpu == "auto" or load_gpu(_stated(q.gpu, "name a GPU, or auto")),
        "num_gpus": lambda: _whole(q.num_gpus),
        "workload": lambda: load_workload(_stated(q.workload, "name a workload or a file")),
        "model": lambda: load_model(q.model) if q.model else None,
        "rate": lambda: _number(q.rate),
        "isl": lambda: _number(q.isl),
        "osl": lambda: _number(q.osl),
        "slo": lambda: read_slo(q.slo),
        "max_quality_loss": lambda: read_loss_limit(q.max_quality_loss),
        "objective": lambda: _objective(q.objective),
    }


def _loaded(question: Question, values: dict[str, Any], calibration: str) -> Checked:
    """Load the problem and change its load; each failure goes to the field that caused it."""
    from planner.question import (  # noqa: PLC0415
        PlanRequest,
        changed_load,
        load_problem,
        search_space,
    )

    request = PlanRequest(
        gpu=question.gpu,
        workload=question.workload,
        model=question.model,
        num_gpus=values["num_gpus"],
        slo=values["slo"],
        objective=question.objective,
        calibration=calibration,
        max_quality_loss_pct=values["max_quality_loss"],
    )
    at = "gpu" if question.gpu == "auto" else "model"
    try:
        problem = load_problem(
            gpu=request.gpu,
            workload=request.workload,
            model=request.model,
            slo=request.slo,
            calibration=calibration,
            max_quality_loss_pct=request.max_quality_loss_pct,
        )
        for at, name in (("rate", "rate_per_s"), ("isl", "isl"), ("osl", "osl")):
            problem = changed_load(problem, **{name: values[at]})
        at = "num_gpus"
        search_space(problem, request)
    except PlannerError as error:
        return Checked(errors={at: str(error)})
    return Checked(problem=problem, request=request)


def _stated(text: str, hint: str) -> str:
    if not text:
        raise ConfigError("empty", hint=hint)
    return text


def whole_number(text: str, low: int, high: int) -> int:
    """Return a whole number in some bounds.

    Raises:
        ConfigError: It is none.
    """
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        hint = f"accepted: {low} to {high}"
        raise ConfigError(f"{text!r} is not a whole number in range", hint=hint)
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a whole number", hint="accepted: 1 to 8") from None


def _number(text: str) -> float | None:
    """Return a number, or None for an empty field."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{text!r} is not a number")
    return value


def _objective(text: str) -> str:
    from planner.workloads.model import OBJECTIVES  # noqa: PLC0415

    if text and text not in OBJECTIVES:
        raise ConfigError(f"{text!r} is unknown", hint=f"known: {', '.join(OBJECTIVES)}")
    return text


def read_loss_limit(text: str) -> float | None:
    """Return a limit on the loss of quality in percent, or None for an empty field.

    Raises:
        ConfigError: It is no number, or below 0.
    """
    value = _number(text)
    if value is not None and value < 0:
        raise ConfigError(f"{text!r} is below 0", hint="percent, or empty for no limit")
    return value


def read_slo(text: str) -> dict[str, float]:
    """Return limits as `check_slo` does, from `metric=limit` parted by blanks or commas.

    Raises:
        ConfigError: A limit cannot be read, or its metric is unknown.
    """
    from planner.knobs import parse_assignments  # noqa: PLC0415
    from planner.workloads.model import check_slo  # noqa: PLC0415

    limits = {}
    for metric, limit in parse_assignments(text.replace(",", " ").split(), "SLO").items():
        value = _number(limit)
        limits[metric] = math.nan if value is None else value
    return check_slo(limits, "SLO")
