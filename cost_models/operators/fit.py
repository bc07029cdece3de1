"""What every fitted operator carries beside its constants: where they come from and how good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

from cost_models.operators.grid import ResidualGrid

Params = TypeVar("Params")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFit(Generic[Params]):
    """The constants of one operator for one dtype on one GPU.

    Errors are of shapes left out of the fit, in log(measured / predicted).
    """

    params: Params
    source: str
    """Table and engine version that the constants were fitted on."""
    num_points: int
    mape_pct: float
    """Mean absolute error on all points, in percent, after the final fit."""
    holdout_mape_pct: float
    """The same on whole shapes left out, by cross-validation."""
    log_error_q05: float
    log_error_q95: float
    """5th and 95th percentile of the left-out error: a 90 % interval."""
    covers: Mapping[str, tuple[float, float]]
    """Smallest and largest value of each shape variable seen."""


def params_to_json(params: object) -> dict[str, Any]:
    """Return a parameter dataclass as plain JSON values (floats to 6 digits)."""
    if not is_dataclass(params):
        raise TypeError(f"{params!r} is not a parameter dataclass")
    return {field.name: _to_json(getattr(params, field.name)) for field in fields(params)}


def params_from_json(cls: type[Params], data: Mapping[str, Any]) -> Params:
    """Rebuild a parameter dataclass; `residual` keys become grids."""
    values = {
        name: ResidualGrid.from_json(value) if _is_grid(value) else value
        for name, value in data.items()
    }
    return cls(**values)


def _to_json(value: object) -> object:
    if isinstance(value, ResidualGrid):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


def _is_grid(value: object) -> bool:
    return isinstance(value, Mapping) and "axes_log2" in value
