"""Every operator family: the tables it is fitted on, how, and how a table is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import OperatorFits
from cost_models.errors import ProfileError
from cost_models.fitting.attention import (
    fit_attention_decode,
    fit_attention_prefill,
    predict_attention_decode,
    predict_attention_prefill,
)
from cost_models.fitting.collectives import (
    fit_allreduce,
    fit_nccl,
    predict_allreduce,
    predict_nccl,
)
from cost_models.fitting.gemm import fit_gemm, predict_gemm
from cost_models.fitting.mla import (
    fit_mla_bmm,
    fit_mla_decode,
    fit_mla_prefill,
    predict_mla_bmm,
    predict_mla_decode,
    predict_mla_prefill,
)
from cost_models.fitting.moe import fit_moe, predict_moe
from cost_models.gpu import GpuSpec
from cost_models.operators.fit import OperatorFit
from cost_models.profile_io import load_gpu
from cost_models.tables import Table, num_rows, read_table, select

Fits = Mapping[str, OperatorFit[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One operator family."""

    tables: tuple[str, ...]
    """File stems of its tables, without suffix."""
    fit: Callable[[Table, GpuSpec], dict[str, OperatorFit[Any]]]
    predict: Callable[[Table, GpuSpec, Any], NDArray[np.float64]]
    dtype_column: str
    """Column that names the dtype a person groups errors by."""


FAMILIES: Mapping[str, Family] = {
    "gemm": Family(
        tables=("gemm", "gemm_weight_only_legacy"),
        fit=fit_gemm,
        predict=predict_gemm,
        dtype_column="dtype",
    ),
    "attention_prefill": Family(
        tables=("attention_context",),
        fit=fit_attention_prefill,
        predict=predict_attention_prefill,
        dtype_column="kv_cache_dtype",
    ),
    "attention_decode": Family(
        tables=("attention_decode",),
        fit=fit_attention_decode,
        predict=predict_attention_decode,
        dtype_column="kv_cache_dtype",
    ),
    "moe": Family(tables=("moe",), fit=fit_moe, predict=predict_moe, dtype_column="dtype"),
    "mla_prefill": Family(
        tables=("mla_context",),
        fit=fit_mla_prefill,
        predict=predict_mla_prefill,
        dtype_column="kv_cache_dtype",
    ),
    "mla_decode": Family(
        tables=("mla_decode",),
        fit=fit_mla_decode,
        predict=predict_mla_decode,
        dtype_column="kv_cache_dtype",
    ),
    "mla_bmm": Family(
        tables=("mla_bmm",), fit=fit_mla_bmm, predict=predict_mla_bmm, dtype_column="dtype"
    ),
    "allreduce": Family(
        tables=("allreduce_custom",),
        fit=fit_allreduce,
        predict=predict_allreduce,
        dtype_column="dtype",
    ),
    "nccl": Family(tables=("nccl",), fit=fit_nccl, predict=predict_nccl, dtype_column="dtype"),
}

TABLE_NAMES: Mapping[str, str] = {
    **{stem: family for family, entry in FAMILIES.items() for stem in entry.tables},
    **{family: family for family in FAMILIES},
}
"""Family by the name that its table, or a `family` column, gives it."""


SUFFIXES = (".parquet", ".csv")


def fit_operators(folder: Path, gpu: GpuSpec) -> dict[str, dict[str, OperatorFit[Any]]]:
    """Fit every family for which the folder holds a table of this GPU.

    Args:
        folder: Holds `gemm.parquet`, `attention_decode.csv`, … with a `system` column.
        gpu: Whose rows are fitted, and its datasheet.

    Raises:
        ProfileError: The folder holds no table of this GPU.
    """
    fitted = {}
    for name, family in FAMILIES.items():
        table = _merged(folder, family, gpu.name)
        if table is not None:
            fitted[name] = family.fit(table, gpu)
    if not fitted:
        raise ProfileError(f"{folder}: no operator table of {gpu.name}")
    return fitted


def has_table(folder: Path, family: str) -> bool:
    """Whether a folder holds a table of this family."""
    stems = FAMILIES[family].tables
    return any((folder / f"{stem}{suffix}").is_file() for stem in stems for suffix in SUFFIXES)


def predict_table(family: str, table: Table, gpu: GpuSpec, fits: OperatorFits) -> Any:
    """Return the predicted seconds of every row of one family's table."""
    entry = FAMILIES[family]
    return entry.predict(table, gpu, getattr(fits, family))


def _merged(folder: Path, family: Family, system: str) -> Table | None:
    """A family's tables as one; of a dtype that several hold, the first table's rows."""
    merged: Table | None = None
    for stem in family.tables:
        table = _rows_of(folder, stem, system)
        if table is None:
            continue
        if merged is None:
            merged = table
            continue
        new = ~np.isin(table[family.dtype_column], merged[family.dtype_column])
        added = select(table, new)
        merged = {
            column: np.concatenate([merged[column], added[column]])
            for column in merged
            if column in added
        }
    return merged


def _is_system(names: NDArray[np.generic], system: str) -> NDArray[np.bool_]:
    """Which rows are of a GPU, under its name or an alias."""
    same = [str(name) for name in np.unique(names) if _profile_name(str(name)) == system]
    return np.isin(names, same)


def _profile_name(system: str) -> str:
    try:
        return load_gpu(system).name
    except ProfileError:
        return system


def _rows_of(folder: Path, stem: str, system: str) -> Table | None:
    for suffix in SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            table = read_table(path)
            rows = select(table, _is_system(table["system"], system))
            return _newest(rows) if num_rows(rows) else None
    return None


def _newest(table: Table) -> Table:
    """Keep one framework version: the last by name, where several were measured."""
    if "framework_version" not in table:
        return table
    versions = np.unique(table["framework_version"])
    return select(table, table["framework_version"] == versions[-1])
