"""Compares the operator models with tables of measured latencies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.errors import ProfileError
from cost_models.fitting.operators import FAMILIES, TABLE_NAMES, predict_table
from cost_models.profile_io import load_gpu
from cost_models.tables import Table, latency_s, num_rows, read_table, select
from engines.registry import load_calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorError:
    """Error of one operator family and dtype on one GPU, in percent of the measurement."""

    system: str
    family: str
    dtype: str
    n: int
    mape_pct: float
    median_ape_pct: float
    bias_pct: float

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def validate_operators(path: str | Path) -> list[OperatorError]:
    """Predict every row of an operator table and compare, by system, family and dtype.

    Args:
        path: CSV with a `family` column, or a file named after its family.

    Raises:
        ProfileError: The file is missing or damaged, or its family is unknown.
    """
    table = read_table(path)
    for column in ("system", "latency_us"):
        if column not in table:
            raise ProfileError(f"{path}: column {column!r} is missing")
    errors = []
    for family, part in _by_family(table, Path(path)):
        for system in np.unique(part["system"]):
            rows = select(part, part["system"] == system)
            errors += _errors(rows, str(system), family, path)
    return errors


def _by_family(table: Table, path: Path) -> list[tuple[str, Table]]:
    if "family" not in table:
        return [(_family(path.stem, path), table)]
    names = [str(name) for name in np.unique(table["family"])]
    return [(_family(name, path), select(table, table["family"] == name)) for name in names]


def _family(name: str, path: Path) -> str:
    if name not in TABLE_NAMES:
        raise ProfileError(
            f"{path}: operator family {name!r} is unknown", hint=f"known: {', '.join(TABLE_NAMES)}"
        )
    return TABLE_NAMES[name]


def _errors(rows: Table, system: str, family: str, path: str | Path) -> list[OperatorError]:
    gpu = load_gpu(system)
    rows = _filled(rows)
    try:
        predicted = predict_table(family, rows, gpu, load_calibration(gpu).operators)
    except KeyError as error:
        raise ProfileError(f"{path}: column {error} is missing for family {family}") from None
    measured = latency_s(rows)
    dtypes = rows[FAMILIES[family].dtype_column]
    errors = []
    for dtype in np.unique(dtypes):
        known = (dtypes == dtype) & np.isfinite(predicted) & (measured > 0)
        if not known.any():
            continue
        miss = predicted[known] / measured[known] - 1.0
        errors.append(
            OperatorError(
                system=system,
                family=family,
                dtype=str(dtype),
                n=int(known.sum()),
                mape_pct=float(np.mean(np.abs(miss)) * 100),
                median_ape_pct=float(np.median(np.abs(miss)) * 100),
                bias_pct=float(np.mean(miss) * 100),
            )
        )
    return errors


def _filled(rows: Table) -> Table:
    """Drop the columns that a mixed table leaves empty for this family, and type the others.

    A CSV that holds several families has text where another family's column is empty.
    """
    filled = {}
    for name, column in rows.items():
        if column.dtype.kind not in "US":
            if column.dtype.kind == "f" and np.isnan(column).all():
                continue
            filled[name] = column
            continue
        if (column == "").all():
            continue
        filled[name] = _number(column)
    return filled if num_rows(rows) else rows


def _number(column: Any) -> Any:
    for dtype in (np.int64, np.float64):
        try:
            return column.astype(dtype)
        except ValueError:
            continue
    return column
