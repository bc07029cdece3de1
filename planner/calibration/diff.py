"""What differs between two calibrations, and what that does to a prediction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cost_models.calibration import Calibration, OperatorFits
from cost_models.profile_io import load_gpu
from engines.registry import load_calibration
from planner.measuring.cases import asked_of_plan, plan_configs
from planner.own_calibrations import SHIPPED, files_in_force
from planner.prediction.predict import predict_deployment
from planner.question import load_problem
from planner.workloads.demand import workload_demand

SHOWN_METRICS = (
    "ttft_ms.p99",
    "tpot_ms.mean",
    "e2el_ms.p99",
    "output_tok_per_s_per_gpu",
    "goodput_request_per_s",
    "kv_cache_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One number before and after."""

    name: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After over before; 0 where there was nothing before."""
        return self.after / self.before if self.before else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationDiff:
    """How one calibration differs from another."""

    constants: tuple[Change, ...]
    intervals: tuple[Change, ...]
    """Widths of the 90 % intervals, in percent of the value."""
    operators: tuple[str, ...]
    """Families and dtypes whose fit is another one."""
    metrics: tuple[Change, ...] = ()
    """Of the configuration that a plan recommends, under its load."""

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            name: [asdict(change) for change in getattr(self, name)]
            for name in ("constants", "intervals", "metrics")
        } | {"operators": list(self.operators)}


def compare(
    *, gpu: str, engine: str, before: str = SHIPPED, after: str = "", plan: str = ""
) -> CalibrationDiff:
    """Compare two calibrations, each named as `--calibration` takes it.

    Args:
        gpu: Profile name; a plan's own where there is a plan.
        engine: The same.
        before: A file, `shipped`, or empty for the user's own.
        after: Another.
        plan: A plan.json whose recommendation is predicted under both; may be empty.

    Raises:
        PlannerError: A file cannot be read, or is of another GPU or engine.
    """
    asked = asked_of_plan(Path(plan)) if plan else {"gpu": gpu, "engine": engine}
    spec, engine = load_gpu(asked["gpu"]), asked["engine"]
    one, other = (
        load_calibration(spec, engine, files_in_force(name, gpu=spec.name, engine=engine))
        for name in (before, after)
    )
    found = compare_calibrations(one, other)
    metrics = compare_predictions(plan, before, after) if plan else ()
    return replace(found, metrics=metrics)


def compare_calibrations(before: Calibration, after: Calibration) -> CalibrationDiff:
    """Return every constant, interval and operator in which two calibrations differ."""
    return CalibrationDiff(
        constants=_changes(_constants(before), _constants(after)),
        intervals=_changes(_widths(before), _widths(after)),
        operators=tuple(
            f"{field.name}/{dtype}"
            for field in fields(OperatorFits)
            for dtype, fit in getattr(after.operators, field.name).items()
            if getattr(before.operators, field.name).get(dtype) != fit
        ),
    )


def compare_predictions(plan: str, before: str, after: str) -> tuple[Change, ...]:
    """Return what a plan's recommendation is predicted to do under two calibrations.

    Args:
        plan: A plan.json.
        before: A calibration as `--calibration` takes it.
        after: Another.

    Raises:
        PlannerError: Not a plan, or what it was made for is no longer there.
    """
    path = Path(plan)
    (config,) = plan_configs(path)
    asked = asked_of_plan(path)
    given = {name: asked[name] for name in ("gpu", "workload", "model", "engine", "slo")}
    problems = [load_problem(**given, calibration=calibration) for calibration in (before, after)]
    demand = workload_demand(problems[0].workload)
    predictions = [
        predict_deployment(problem.evaluator, problem.deployment_of(config), demand)
        for problem in problems
    ]
    one, other = ({name: p.value(name) for name in SHOWN_METRICS} for p in predictions)
    return _changes(one, other, all_names=True)


def _constants(calibration: Calibration) -> dict[str, float]:
    values: dict[str, float] = {}
    for part in ("step", "memory", "front_end"):
        for name, value in asdict(getattr(calibration, part)).items():
            if isinstance(value, dict):
                values |= {f"{name}.{key}": float(scale) for key, scale in value.items()}
            else:
                values[name] = float(value)
    return values


def _widths(calibration: Calibration) -> dict[str, float]:
    return {
        name: 100 * (found.log_q95 - found.log_q05) for name, found in calibration.intervals.items()
    }


def _changes(
    before: dict[str, float], after: dict[str, float], *, all_names: bool = False
) -> tuple[Change, ...]:
    return tuple(
        Change(name=name, before=before.get(name, 0.0), after=value)
        for name, value in after.items()
        if all_names or before.get(name) != value
    )
