"""Reads tables of measured operator latencies: CSV, or parquet where pyarrow is installed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.errors import ProfileError

Table = dict[str, NDArray[np.generic]]
"""Columns by name, all of one length; numbers as int64 or float64, the rest as str."""


def read_table(path: str | Path) -> Table:
    """Return the columns of a CSV or parquet file.

    Raises:
        ProfileError: The file is missing, of another kind, or pyarrow is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ProfileError(f"{path}: no such file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    raise ProfileError(f"{path}: not an operator table", hint="give a .csv or .parquet file")


def select(table: Table, mask: NDArray[np.bool_]) -> Table:
    """Return the rows where `mask` holds."""
    return {name: column[mask] for name, column in table.items()}


def latency_s(table: Table) -> NDArray[np.float64]:
    """Return the measured latency of every row in seconds; tables hold microseconds."""
    return table["latency_us"].astype(np.float64) * 1e-6


def num_rows(table: Table) -> int:
    """Return the number of rows."""
    return len(next(iter(table.values()), ()))


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415  optional, only for parquet
        from pyarrow.types import is_dictionary  # noqa: PLC0415
    except ImportError:
        raise ProfileError(
            f"{path}: parquet needs pyarrow", hint="pip install pyarrow, or convert to CSV"
        ) from None
    table = pq.read_table(path)
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if is_dictionary(column.type):
            # Encoded, a cell without a value would become the first value of the dictionary.
            column = column.cast(column.type.value_type)
        columns[name] = _plain(column.to_numpy())
    return columns


def _plain(values: NDArray[Any]) -> NDArray[np.generic]:
    """Return a column of the kinds of `Table`; numbers at once, tables have millions of them."""
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    if values.dtype.kind == "f":
        return values.astype(np.float64)
    return _typed(values.tolist())


def _read_csv(path: Path) -> Table:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ProfileError(f"{path}: not a CSV file ({error})") from None
    if not rows or reader.fieldnames is None:
        raise ProfileError(f"{path}: holds no rows")
    if any(None in row or None in row.values() for row in rows):
        raise ProfileError(f"{path}: a row has more or fewer cells than the header")
    return {name: _typed([row[name] for row in rows]) for name in reader.fieldnames}


def _typed(values: list[object]) -> NDArray[np.generic]:
    for dtype in (np.int64, np.float64):
        try:
            column = np.array(values, dtype=dtype)
        except (TypeError, ValueError, OverflowError):
            continue
        if dtype is np.float64 or all(not isinstance(v, float) for v in values):
            return column
    return np.array([str(value) for value in values])
