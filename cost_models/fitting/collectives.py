"""Fits the collectives to tables of measured latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.fitting.constants import Bounds, fit_constants
from cost_models.fitting.grid import fit_residual_grid
from cost_models.fitting.quality import fit_quality, folds_by_key
from cost_models.gpu import GpuSpec
from cost_models.operators.collectives import (
    AllReduceParams,
    NcclParams,
    allreduce_seconds,
    nccl_seconds,
)
from cost_models.operators.fit import OperatorFit
from cost_models.operators.grid import ResidualGrid
from cost_models.tables import Table, latency_s, num_rows, select

FloatArray = NDArray[np.float64]

ALLREDUCE_BOUNDS: Bounds = {
    "one_shot_s": (3e-6, 5e-7, 1e-4),
    "one_shot_efficiency": (0.7, 0.05, 2.0),
    "two_shot_s": (2e-5, 1e-6, 1e-3),
    "two_shot_efficiency": (0.8, 0.05, 2.0),
    "rank_s": (1e-7, 1e-9, 1e-5),
}

NCCL_BOUNDS: Bounds = {
    "latency_s": (1e-5, 1e-6, 1e-3),
    "rank_s": (5e-7, 1e-9, 1e-4),
    "efficiency": (0.8, 0.02, 2.0),
    "norm": (0.8, 0.3, 6.0),
}


def fit_allreduce(table: Table, gpu: GpuSpec) -> dict[str, OperatorFit[AllReduceParams]]:
    """Return the fitted custom all-reduce by dtype.

    Args:
        table: Columns dtype, num_gpus, message_bytes, latency_us, framework_version of
            one system.
        gpu: The system's datasheet.
    """
    version = table["framework_version"][0]
    return {
        str(dtype): _fit(
            select(table, table["dtype"] == dtype),
            lambda rows, params: allreduce_seconds(
                rows["message_bytes"], rows["num_gpus"], gpu=gpu, params=params
            ),
            lambda constants: AllReduceParams(**constants),
            ALLREDUCE_BOUNDS,
            source=f"custom all-reduce on {gpu.name}, TensorRT-LLM {version}",
        )
        for dtype in np.unique(table["dtype"])
    }


def fit_nccl(table: Table, gpu: GpuSpec) -> dict[str, OperatorFit[NcclParams]]:
    """Return the fitted NCCL collectives by `collective/dtype`.

    Args:
        table: Columns collective, dtype, num_gpus, message_bytes, latency_us and, where it is
            known, nccl_version of one system.
        gpu: The system's datasheet.
    """
    version = f", NCCL {table['nccl_version'][0]}" if "nccl_version" in table else ""
    fits: dict[str, OperatorFit[NcclParams]] = {}
    keys = set(zip(table["collective"].tolist(), table["dtype"].tolist(), strict=True))
    for collective, dtype in sorted(keys):
        rows = (table["collective"] == collective) & (table["dtype"] == dtype)
        passes = 2.0 if collective == "all_reduce" else 1.0
        fits[f"{collective}/{dtype}"] = _fit(
            select(table, rows),
            lambda part, params: nccl_seconds(
                part["message_bytes"], part["num_gpus"], gpu=gpu, params=params
            ),
            lambda constants, passes=passes: NcclParams(passes=passes, **constants),
            NCCL_BOUNDS,
            source=f"{collective} on {gpu.name}{version}",
        )
    return fits


def predict_allreduce(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[AllReduceParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves its dtype."""
    seconds = np.full(num_rows(table), np.nan)
    for dtype, fit in fits.items():
        rows = table["dtype"] == dtype
        seconds[rows] = allreduce_seconds(
            table["message_bytes"][rows], table["num_gpus"][rows], gpu=gpu, params=fit.params
        )
    return seconds


def predict_nccl(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[NcclParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves its collective."""
    seconds = np.full(num_rows(table), np.nan)
    for key, fit in fits.items():
        collective, dtype = key.split("/")
        rows = (table["collective"] == collective) & (table["dtype"] == dtype)
        seconds[rows] = nccl_seconds(
            table["message_bytes"][rows], table["num_gpus"][rows], gpu=gpu, params=fit.params
        )
    return seconds


def _fit(
    table: Table,
    predict: Callable[[Table, Any], FloatArray],
    build: Callable[..., Any],
    bounds: Bounds,
    *,
    source: str,
) -> OperatorFit[Any]:
    """Fit constants, then a residual for each message size and number of ranks."""
    measured_s = latency_s(table)
    params = build(
        fit_constants(lambda constants: predict(table, build(constants)), measured_s, bounds)
    )
    log_error = np.log(measured_s / predict(table, params))
    left_out = np.zeros(log_error.size)
    for train, test in folds_by_key(table["message_bytes"]):
        grid = _grid(select(table, train), log_error[train])
        factor = grid.log_factor(table["message_bytes"][test], table["num_gpus"][test])
        left_out[test] = log_error[test] - factor
    params = replace(params, residual=_grid(table, log_error))
    return OperatorFit(
        params=params,
        source=source,
        covers={
            name: (float(table[name].min()), float(table[name].max()))
            for name in ("message_bytes", "num_gpus")
        },
        **fit_quality(measured_s, predict(table, params), left_out),
    )


def _grid(table: Table, log_error: FloatArray) -> ResidualGrid:
    columns = [table[name].astype(np.float64) for name in ("message_bytes", "num_gpus")]
    axes = [np.unique(np.log2(column)) for column in columns]
    return fit_residual_grid(axes, columns, log_error, smoothness=0.03)
