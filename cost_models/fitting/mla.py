"""Fits the constants of multi-head latent attention to tables of measured latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cost_models.fitting.constants import Bounds, fit_constants
from cost_models.fitting.grid import fit_residual_grid
from cost_models.fitting.quality import fit_quality, folds_by_key
from cost_models.gpu import GpuSpec
from cost_models.operators.fit import OperatorFit
from cost_models.operators.grid import ResidualGrid
from cost_models.operators.mla import (
    MlaBmmParams,
    MlaDecodeParams,
    MlaPrefillParams,
    mla_bmm_seconds,
    mla_decode_seconds,
    mla_prefill_seconds,
)
from cost_models.tables import Table, latency_s, num_rows, select

FloatArray = NDArray[np.float64]

Params = TypeVar("Params", MlaPrefillParams, MlaDecodeParams, MlaBmmParams)

OUTLIER_LOG_ERROR = 0.03
"""Error beyond which a row pulls less: single rows of the tables are 50 times too slow."""

REWEIGHTINGS = 3
"""Rounds of fitting the residual with outliers weighted down."""

DECODE_HEADS = (1.0, 16.0, 64.0, 128.0)
"""Knots over heads; below 64 the kernels pad."""

SMOOTHNESS = 0.1
"""Weight of the residual grids' smoothness, chosen by cross-validation."""

ELEMENT_BYTES: Mapping[str, float] = {"bfloat16": 2.0, "fp8": 1.0}

COMPUTE: Mapping[str, str] = {"bfloat16": "bf16", "fp8": "fp8"}

FLASH_BOUNDS: Bounds = {
    "launch_s": (12e-6, 1e-6, 1e-4),
    "hbm_efficiency": (0.8, 0.1, 3.0),
    "latent_passes": (1.0, 0.01, 10.0),
    "compute_efficiency": (0.5, 0.02, 1.0),
    "tile_s": (1.4e-6, 1e-8, 5e-5),
    "longest_tile_share": (0.75, 1e-3, 3.0),
    "norm": (1.5, 1.0, 6.0),
}

DECODE_BOUNDS: Bounds = {
    "launch_s": (14e-6, 1e-6, 5e-5),
    "hbm_efficiency": (0.85, 0.3, 0.95),
    "compute_efficiency": (0.6, 0.05, 1.0),
    "sequence_s": (2e-6, 1e-8, 5e-5),
    "split_s": (5e-6, 1e-8, 5e-5),
    "split_tokens": (1000.0, 10.0, 1e6),
    "head_passes": (1.0, 0.01, 10.0),
    "norm": (2.0, 1.0, 8.0),
}

BMM_BOUNDS: Bounds = {
    "launch_s": (4.5e-6, 5e-7, 5e-5),
    "hbm_efficiency": (0.8, 0.1, 3.0),
    "compute_efficiency": (0.6, 0.02, 1.0),
    "tile_s": (1e-6, 1e-9, 2e-5),
    "norm": (2.0, 1.0, 8.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operator(Generic[Params]):
    """What differs between the three operators when they are fitted."""

    title: str
    build: Callable[[str, Mapping[str, float]], Params]
    """Parameters from dtype and fitted constants."""
    bounds: Bounds
    seconds: Callable[[Table, GpuSpec, Params], FloatArray]
    """Predicted time of every row."""
    coordinates: Callable[[Table], Sequence[FloatArray]]
    """Where the residual of each row is looked up."""
    knots: Mapping[int, Sequence[float]] = field(default_factory=dict)
    """Knots of an axis; by default every measured value is one."""


def fit_mla_prefill(table: Table, gpu: GpuSpec) -> dict[str, OperatorFit[MlaPrefillParams]]:
    """Return the fits of MLA prefill by KV-cache dtype."""
    operator = _Operator(
        title="MLA prefill",
        build=_prefill_params,
        bounds=FLASH_BOUNDS,
        seconds=_prefill_seconds,
        coordinates=_prefill_coordinates,
    )
    return {
        dtype: _fit(rows, gpu, operator, dtype)
        for dtype, rows in _by_value(table, "kv_cache_dtype")
    }


def fit_mla_decode(table: Table, gpu: GpuSpec) -> dict[str, OperatorFit[MlaDecodeParams]]:
    """Return the fits of MLA decode by KV-cache dtype."""
    operator = _Operator(
        title="MLA decode",
        build=_decode_params,
        bounds=DECODE_BOUNDS,
        seconds=_decode_seconds,
        coordinates=lambda t: _columns(t, "kv_len", "batch_size", "num_heads"),
        knots={2: DECODE_HEADS},
    )
    return {
        dtype: _fit(rows, gpu, operator, dtype)
        for dtype, rows in _by_value(table, "kv_cache_dtype")
    }


def fit_mla_bmm(table: Table, gpu: GpuSpec) -> dict[str, OperatorFit[MlaBmmParams]]:
    """Return the fits of the absorption GEMMs, keyed by operation and dtype."""
    operator = _Operator(
        title="MLA absorption",
        build=_bmm_params,
        bounds=BMM_BOUNDS,
        seconds=_bmm_seconds,
        coordinates=lambda t: _columns(t, "num_tokens", "num_heads"),
    )
    return {
        f"{op}/{dtype}": _fit(rows, gpu, operator, dtype)
        for dtype, of_dtype in _by_value(table, "dtype")
        for op, rows in _by_value(of_dtype, "op")
    }


def predict_mla_prefill(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[MlaPrefillParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves it."""
    return _predict(table, gpu, fits, table["kv_cache_dtype"].astype(str), _prefill_seconds)


def predict_mla_decode(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[MlaDecodeParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves it."""
    return _predict(table, gpu, fits, table["kv_cache_dtype"].astype(str), _decode_seconds)


def predict_mla_bmm(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[MlaBmmParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves it."""
    operation = np.char.add(table["op"].astype(str), "/")
    keys = np.char.add(operation, table["dtype"].astype(str))
    return _predict(table, gpu, fits, keys, _bmm_seconds)


def _prefill_params(dtype: str, constants: Mapping[str, float]) -> MlaPrefillParams:
    return MlaPrefillParams(compute=COMPUTE[dtype], residual=None, **constants)


def _decode_params(dtype: str, constants: Mapping[str, float]) -> MlaDecodeParams:
    return MlaDecodeParams(
        compute=COMPUTE[dtype], kv_bytes=ELEMENT_BYTES[dtype], residual=None, **constants
    )


def _bmm_params(dtype: str, constants: Mapping[str, float]) -> MlaBmmParams:
    return MlaBmmParams(
        compute=COMPUTE[dtype], weight_bytes=ELEMENT_BYTES[dtype], residual=None, **constants
    )


def _columns(table: Table, *names: str) -> list[FloatArray]:
    return [table[name].astype(np.float64) for name in names]


def _prefill_coordinates(table: Table) -> Sequence[FloatArray]:
    seq_len, batch_size, num_heads = _columns(table, "seq_len", "batch_size", "num_heads")
    return seq_len, batch_size * num_heads


def _by_value(table: Table, column: str) -> list[tuple[str, Table]]:
    names = np.unique(table[column].astype(str)).tolist()
    return [(name, select(table, table[column].astype(str) == name)) for name in names]


def _predict(
    table: Table,
    gpu: GpuSpec,
    fits: Mapping[str, OperatorFit[Params]],
    keys: NDArray[np.str_],
    seconds_of: Callable[[Table, GpuSpec, Params], FloatArray],
) -> FloatArray:
    seconds = np.full(num_rows(table), np.nan)
    for key, fit in fits.items():
        rows = keys == key
        seconds[rows] = seconds_of(select(table, rows), gpu, fit.params)
    return seconds


def _prefill_seconds(table: Table, gpu: GpuSpec, params: MlaPrefillParams) -> FloatArray:
    return mla_prefill_seconds(
        table["num_heads"], table["seq_len"], 0.0, table["batch_size"], gpu=gpu, params=params
    )


def _decode_seconds(table: Table, gpu: GpuSpec, params: MlaDecodeParams) -> FloatArray:
    return mla_decode_seconds(
        table["num_heads"], table["batch_size"], table["kv_len"], gpu=gpu, params=params
    )


def _bmm_seconds(table: Table, gpu: GpuSpec, params: MlaBmmParams) -> FloatArray:
    return mla_bmm_seconds(table["num_heads"], table["num_tokens"], gpu=gpu, params=params)


def _fit(
    table: Table, gpu: GpuSpec, operator: _Operator[Params], dtype: str
) -> OperatorFit[Params]:
    measured_s = latency_s(table)
    constants = fit_constants(
        lambda constants: operator.seconds(table, gpu, operator.build(dtype, constants)),
        measured_s,
        operator.bounds,
    )
    params = operator.build(dtype, constants)
    log_error = np.log(measured_s / operator.seconds(table, gpu, params))
    coordinates = operator.coordinates(table)
    axes = [np.unique(np.log2(operator.knots.get(axis, c))) for axis, c in enumerate(coordinates)]
    left_out = np.zeros(log_error.size)
    for train, test in folds_by_key(table["num_heads"]):
        grid = _robust_grid(axes, [c[train] for c in coordinates], log_error[train])
        left_out[test] = log_error[test] - grid.log_factor(*(c[test] for c in coordinates))
    grid = _robust_grid(axes, coordinates, log_error)
    with_residual: Any = replace(params, residual=grid)
    return OperatorFit(
        params=with_residual,
        source=f"{operator.title} on {gpu.name}, TensorRT-LLM {table['framework_version'][0]}",
        covers=_covers(table),
        **fit_quality(measured_s, operator.seconds(table, gpu, with_residual), left_out),
    )


def _robust_grid(
    axes: Sequence[FloatArray], coordinates: Sequence[FloatArray], log_error: FloatArray
) -> ResidualGrid:
    """Iteratively reweighted least squares: between a mean and a median of the residuals."""
    weight = np.ones(log_error.size)
    for _ in range(REWEIGHTINGS):
        grid = fit_residual_grid(axes, coordinates, log_error, smoothness=SMOOTHNESS, weight=weight)
        left = log_error - grid.log_factor(*coordinates)
        weight = 1 / np.sqrt(1 + (left / OUTLIER_LOG_ERROR) ** 2)
    return grid


def _covers(table: Table) -> dict[str, tuple[float, float]]:
    names = [
        n for n in ("num_heads", "batch_size", "seq_len", "kv_len", "num_tokens") if n in table
    ]
    return {name: (float(table[name].min()), float(table[name].max())) for name in names}
