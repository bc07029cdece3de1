"""Fits `GemmParams` to tables of measured GEMM latencies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.fitting.constants import Bounds, fit_constants
from cost_models.fitting.kriging import krige, left_out_error
from cost_models.fitting.quality import fit_quality
from cost_models.gpu import GpuSpec
from cost_models.operators.fit import OperatorFit
from cost_models.operators.gemm import GemmParams, gemm_seconds
from cost_models.operators.grid import ResidualGrid
from cost_models.tables import Table, latency_s, num_rows, select

FloatArray = NDArray[np.float64]

CAST_LAUNCH_S = 1.3e-6
"""The kernel that scales and narrows activations (`scale_matrix`), without finding the scale."""

SUBSAMPLE = 1500
"""Points on which the physical constants are fitted; the residual grid sees all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """What is known of a dtype before fitting."""

    compute: str
    weight_bytes: float
    activation_bytes: float
    quantizes: bool = False
    """The table includes the kernel that narrows the activations."""
    scales_tensor: bool = False
    """The table includes the kernels that find one scale for all activations."""


FORMATS: Mapping[str, _Format] = {
    "bfloat16": _Format(compute="bf16", weight_bytes=2, activation_bytes=2),
    "fp8": _Format(
        compute="fp8", weight_bytes=1, activation_bytes=1, quantizes=True, scales_tensor=True
    ),
    "fp8_block": _Format(compute="fp8", weight_bytes=1, activation_bytes=1, quantizes=True),
    "nvfp4": _Format(compute="fp4", weight_bytes=0.5625, activation_bytes=0.5625, quantizes=True),
    "int8_wo": _Format(compute="bf16", weight_bytes=1, activation_bytes=2),
    "int4_wo": _Format(compute="bf16", weight_bytes=0.5, activation_bytes=2),
    "sq": _Format(compute="int8", weight_bytes=1, activation_bytes=1),
}

BOUNDS: Bounds = {
    "launch_s": (3e-6, 3e-7, 4e-5),
    "scale_s": (2e-6, 1e-8, 4e-5),
    "quantize_bytes_per_s": (2.5e12, 2e11, 5e13),
    "compute_efficiency": (0.85, 0.1, 1.05),
    "hbm_efficiency": (0.80, 0.4, 0.98),
    "l2_speedup": (2.5, 1.5, 4.0),
    "l2_share": (0.7, 0.3, 1.2),
    "l2_sharpness": (4.0, 2.0, 64.0),
    "roofline_norm": (3.0, 1.0, 8.0),
    "sm_bytes_per_s": (150e9, 2e10, 1e12),
    "tile_s": (1e-6, 1e-8, 2e-5),
    "split_s": (2.5e-6, 1e-8, 2e-5),
    "wave_rounding": (0.1, 1e-3, 1.0),
}


def fit_gemm(table: Table, gpu: GpuSpec) -> dict[str, OperatorFit[GemmParams]]:
    """Return the fitted constants by dtype.

    Args:
        table: Columns dtype, m, n, k, latency_us, framework_version of one system.
        gpu: The system's datasheet.
    """
    fits: dict[str, OperatorFit[GemmParams]] = {}
    for dtype in sorted(np.unique(table["dtype"]).tolist(), key=lambda name: name != "bfloat16"):
        rows = select(table, table["dtype"] == dtype)
        plain = fits["bfloat16"].params.launch_s if fits else BOUNDS["launch_s"][0]
        fits[dtype] = _fit_dtype(rows, gpu, dtype, plain_launch_s=plain)
    return fits


def predict_gemm(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[GemmParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves its dtype."""
    seconds = np.full(num_rows(table), np.nan)
    for dtype, fit in fits.items():
        rows = table["dtype"] == dtype
        if rows.any():
            seconds[rows] = _predict(select(table, rows), gpu, fit.params)
    return seconds


def _predict(table: Table, gpu: GpuSpec, params: GemmParams) -> FloatArray:
    return gemm_seconds(table["m"], table["n"], table["k"], gpu=gpu, params=params)


def _fit_dtype(
    table: Table, gpu: GpuSpec, dtype: str, *, plain_launch_s: float
) -> OperatorFit[GemmParams]:
    measured_s = latency_s(table)
    params = _fit_constants(table, gpu, dtype, plain_launch_s=plain_launch_s)
    log_error = np.log(measured_s / _predict(table, gpu, params))
    lattice = _Lattice.of(table, log_error)
    params = replace(params, residual=lattice.grid())
    return OperatorFit(
        params=params,
        source=f"{dtype} GEMM on {gpu.name}, TensorRT-LLM {table['framework_version'][0]}",
        covers={c: (float(table[c].min()), float(table[c].max())) for c in "mnk"},
        **fit_quality(measured_s, _predict(table, gpu, params), lattice.left_out_error()),
    )


def _fit_constants(table: Table, gpu: GpuSpec, dtype: str, *, plain_launch_s: float) -> GemmParams:
    """Least squares on log error over a spread-out subsample, in log of the constants.

    Launch and scale time cannot be told apart by size, so a dtype that does both takes
    the launch of the BF16 kernel and of one cast; what is left is the scale kernel.
    """
    form = FORMATS[dtype]
    fixed: dict[str, float] = {} if form.quantizes else {"quantize_bytes_per_s": 0.0}
    if form.scales_tensor:
        fixed |= {"launch_s": plain_launch_s, "cast_s": CAST_LAUNCH_S}
    else:
        fixed |= {"scale_s": 0.0, "cast_s": 0.0}
    names = [name for name in BOUNDS if name not in fixed]
    step = max(num_rows(table) // SUBSAMPLE, 1)
    sample = select(table, np.arange(num_rows(table)) % step == 0)

    def build(constants: Mapping[str, float]) -> GemmParams:
        return GemmParams(
            compute=form.compute,
            weight_bytes=form.weight_bytes,
            activation_bytes=form.activation_bytes,
            timed_warm=_timed_warm(str(table["framework_version"][0])),
            residual=None,
            **fixed,
            **constants,
        )

    constants = fit_constants(
        lambda constants: _predict(sample, gpu, build(constants)),
        latency_s(sample),
        {name: BOUNDS[name] for name in names},
    )
    return build(constants)


def _timed_warm(framework_version: str) -> bool:
    """Whether the collector of that engine version left small weights in L2.

    `planner microbench`, whose tables name torch as their framework, does as the newer ones.
    """
    version = re.match(r"(\d+)\.(\d+)", framework_version)
    return version is None or (int(version[1]), int(version[2])) >= (1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lattice:
    """Residuals of one dtype by row count and (n, k) pair."""

    m: FloatArray
    """Measured row counts, increasing."""
    pairs: FloatArray
    """Measured (n, k), shape (pairs, 2)."""
    residual: FloatArray
    """log(measured / analytic), shape (m, pairs)."""
    cells: tuple[NDArray[np.intp], NDArray[np.intp]]
    """Row and column of each point of the table."""

    @classmethod
    def of(cls, table: Table, log_error: FloatArray) -> _Lattice:
        m, row = np.unique(table["m"].astype(np.float64), return_inverse=True)
        shapes = np.stack([table["n"], table["k"]], axis=1).astype(np.float64)
        pairs, column = np.unique(shapes, axis=0, return_inverse=True)
        residual = np.full((m.size, len(pairs)), np.nan)
        residual[row.ravel(), column.ravel()] = log_error
        for curve in residual.T:
            seen = ~np.isnan(curve)
            curve[~seen] = np.interp(np.log2(m[~seen]), np.log2(m[seen]), curve[seen])
        return cls(m=m, pairs=pairs, residual=residual, cells=(row.ravel(), column.ravel()))

    def left_out_error(self) -> FloatArray:
        """Return the log error of each point, its (n, k) pair left out of the residual."""
        return left_out_error(self.pairs, self.residual)[self.cells]

    def grid(self) -> ResidualGrid:
        """Return the residual on all combinations of the measured m, n and k."""
        n, k = (np.unique(column) for column in self.pairs.T)
        wanted = np.stack(np.meshgrid(n, k, indexing="ij"), axis=-1).reshape(-1, 2)
        values = krige(self.pairs, self.residual, wanted)
        return ResidualGrid(
            axes=(np.log2(self.m), np.log2(n), np.log2(k)),
            values=values.reshape(self.m.size, n.size, k.size),
        )
