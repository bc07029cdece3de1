"""Fits `PrefillAttentionParams` and `DecodeAttentionParams` to tables of measured latencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.fitting.constants import Bounds, fit_constants
from cost_models.fitting.grid import fit_residual_grid
from cost_models.fitting.quality import fit_quality, folds_by_key
from cost_models.gpu import GpuSpec
from cost_models.operators.attention import (
    AttentionHeads,
    Chunk,
    DecodeAttentionParams,
    PrefillAttentionParams,
    decode_attention_seconds,
    decode_coordinates,
    prefill_attention_seconds,
    prefill_coordinates,
    runs_xqa,
)
from cost_models.operators.fit import OperatorFit
from cost_models.operators.grid import ResidualGrid
from cost_models.tables import Table, latency_s, num_rows, select

FloatArray = NDArray[np.float64]

SUBSAMPLE = 2500
"""Points on which the physical constants are fitted; the residual grids see all."""

SMOOTHNESS = 0.05
"""Weight of the residual grids' smoothness, chosen by cross-validation."""

MIN_ROWS = 150
"""Fewer rows than this do not make a fit."""

KV_BYTES: Mapping[str, float] = {"bfloat16": 2.0, "fp8": 1.0}

COMPUTE: Mapping[str, str] = {"bfloat16": "bf16", "fp8": "fp8"}

XQA_MIN_BLOCKS_PER_SM: Mapping[str, float] = {"bfloat16": 0.25, "fp8": 0.0}
"""Share of the SMs that XQA wants busy (`DecoderXQAImpl::shouldUse`: blocks × 4 ≥ SMs);
an FP8 cache always goes to XQA."""

CONFIG = ("num_heads", "num_kv_heads", "head_dim", "window_size")
"""What makes a head configuration, the shape that is left out as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Knots:
    """Where a residual grid has its knots; the coarsest that cross-validation bears."""

    lengths: tuple[float, ...]
    head_steps: tuple[float, ...]
    """Steps of heads over all sequences, within an octave."""
    group_sizes: tuple[float, ...]


PREFILL_KNOTS = _Knots(
    lengths=(1, *(2.0**i for i in range(5, 15))),
    head_steps=(1.0, 1.5),
    group_sizes=(1, 4, 16, 64),
)

XQA_KNOTS = _Knots(
    lengths=(2, *(2.0**i for i in range(4, 18))),
    head_steps=(1.0,),
    group_sizes=(2, 4, 8, 16, 32),
)

MMHA_KNOTS = _Knots(
    lengths=XQA_KNOTS.lengths,
    head_steps=(1.0, 1.5),
    group_sizes=(1, 64),
)

DECODE_WINDOW_PADDING = 64.0
"""Cached tokens beyond a sliding window that are read: one block of the cache."""

WINDOWED = np.array([0.0, 1.0])
"""log2 of the windows in a sequence: the window cuts nothing off, or half and more."""

PREFILL_BOUNDS: Bounds = {
    "launch_s": (12e-6, 1e-6, 1e-4),
    "hbm_efficiency": (0.8, 0.1, 3.0),
    "tile_s": (1.4e-6, 1e-8, 5e-5),
    "longest_tile_share": (0.75, 1e-3, 3.0),
    "norm": (1.5, 1.0, 6.0),
    "window_padding_tokens": (170.0, 1.0, 2000.0),
}

DECODE_BOUNDS: Bounds = {
    "launch_s": (6e-6, 1e-6, 2e-5),
    "block_s": (2e-6, 1e-8, 2e-5),
    "sm_speed": (2.0, 0.1, 50.0),
    "hbm_efficiency": (0.92, 0.85, 0.95),
    "l2_speedup": (3.0, 1.0, 10.0),
    "l2_share": (0.8, 0.1, 2.0),
    "split_tokens": (256.0, 16.0, 1e7),
    "split_blocks_per_sm": (1.0, 0.1, 8.0),
    "merge_s": (3e-6, 1e-8, 2e-5),
    "norm": (2.5, 1.0, 8.0),
}


def fit_attention_prefill(
    table: Table, gpu: GpuSpec
) -> dict[str, OperatorFit[PrefillAttentionParams]]:
    """Return the fits by key: `bfloat16`, `fp8`, and `bfloat16/fp8` (attention/cache).

    Args:
        table: Rows of prefill attention of one system.
        gpu: The system's datasheet.
    """
    keys = _prefill_keys(table)
    return {
        key: _fit_prefill(select(table, keys == key), gpu)
        for key in np.unique(keys).tolist()
        if np.count_nonzero(keys == key) >= MIN_ROWS
    }


def predict_attention_prefill(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[PrefillAttentionParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves it."""
    seconds = np.full(num_rows(table), np.nan)
    keys = _prefill_keys(table)
    for key in np.unique(keys).tolist():
        fit = fits.get(key, fits.get(key.rpartition("/")[2]))
        if fit is not None:
            seconds[keys == key] = _prefill_seconds(select(table, keys == key), gpu, fit.params)
    return seconds


def fit_attention_decode(
    table: Table, gpu: GpuSpec
) -> dict[str, OperatorFit[DecodeAttentionParams]]:
    """Return the fits by KV-cache dtype, without rows flagged `kv_bandwidth_suspect`.

    Args:
        table: Rows of decode attention of one system.
        gpu: The system's datasheet.
    """
    if "kv_bandwidth_suspect" in table:
        table = select(table, ~_flags(table["kv_bandwidth_suspect"]))
    return {
        dtype: _fit_decode(select(table, table["kv_cache_dtype"] == dtype), gpu)
        for dtype in np.unique(table["kv_cache_dtype"]).tolist()
        if np.count_nonzero(table["kv_cache_dtype"] == dtype) >= MIN_ROWS
    }


def predict_attention_decode(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[DecodeAttentionParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves it."""
    seconds = np.full(num_rows(table), np.nan)
    for dtype, fit in fits.items():
        rows = table["kv_cache_dtype"] == dtype
        seconds[rows] = _decode_seconds(select(table, rows), gpu, fit.params)
    return seconds


def _prefill_keys(table: Table) -> NDArray[np.str_]:
    """Cache dtype, or attention/cache where the two differ."""
    attention, cache = table["attn_dtype"].astype(str), table["kv_cache_dtype"].astype(str)
    return np.where(attention == cache, cache, np.char.add(np.char.add(attention, "/"), cache))


def _flags(column: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Booleans as they come from parquet (numbers) and CSV (text)."""
    return np.isin(np.char.lower(column.astype(str)), ["true", "1", "1.0"])


def _heads(table: Table) -> AttentionHeads:
    return AttentionHeads(**{name: table[name].astype(np.float64) for name in CONFIG})


def _prefill_seconds(table: Table, gpu: GpuSpec, params: PrefillAttentionParams) -> FloatArray:
    return prefill_attention_seconds(
        _heads(table), table["seq_len"], 0.0, table["batch_size"], gpu=gpu, params=params
    )


def _decode_seconds(table: Table, gpu: GpuSpec, params: DecodeAttentionParams) -> FloatArray:
    return decode_attention_seconds(
        _heads(table), table["batch_size"], table["kv_len"], gpu=gpu, params=params
    )


def _fit_prefill(table: Table, gpu: GpuSpec) -> OperatorFit[PrefillAttentionParams]:
    measured_s = latency_s(table)
    params = _prefill_constants(table, gpu)
    log_error = np.log(measured_s / _prefill_seconds(table, gpu, params))
    chunk = Chunk.of(table["seq_len"], 0.0, table["batch_size"])
    grid, left_out = _residual(
        table, prefill_coordinates(_heads(table), chunk), log_error, PREFILL_KNOTS
    )
    params = replace(params, residual=grid)
    return OperatorFit(
        params=params,
        source=_source("prefill attention", table, gpu),
        covers=_covers(table, ("batch_size", "seq_len")),
        **fit_quality(measured_s, _prefill_seconds(table, gpu, params), left_out),
    )


def _prefill_constants(table: Table, gpu: GpuSpec) -> PrefillAttentionParams:
    sample = _spread(table)
    head_dims = [f"{head_dim:g}" for head_dim in np.unique(table["head_dim"]).tolist()]
    efficiencies = {f"efficiency/{head_dim}": (0.5, 0.02, 1.0) for head_dim in head_dims}
    cache, attention = str(table["kv_cache_dtype"][0]), str(table["attn_dtype"][0])

    def build(constants: Mapping[str, float]) -> PrefillAttentionParams:
        return PrefillAttentionParams(
            compute=COMPUTE[attention],
            kv_bytes=KV_BYTES[cache],
            compute_efficiency={d: constants[f"efficiency/{d}"] for d in head_dims},
            residual=None,
            **{name: constants[name] for name in PREFILL_BOUNDS},
        )

    return build(
        fit_constants(
            lambda constants: _prefill_seconds(sample, gpu, build(constants)),
            latency_s(sample),
            {**PREFILL_BOUNDS, **efficiencies},
        )
    )


def _fit_decode(table: Table, gpu: GpuSpec) -> OperatorFit[DecodeAttentionParams]:
    measured_s = latency_s(table)
    params, on_xqa = _decode_constants(table, gpu)
    log_error = np.log(measured_s / _decode_seconds(table, gpu, params))
    left_out = np.zeros(log_error.size)
    grids = []
    for heads, knots, rows in (
        ("num_kv_heads", XQA_KNOTS, on_xqa),
        ("num_heads", MMHA_KNOTS, ~on_xqa),
    ):
        part = select(table, rows)
        coordinates = decode_coordinates(
            _heads(part), part[heads], part["batch_size"], part["kv_len"]
        )
        grid, left_out[rows] = _residual(part, coordinates, log_error[rows], knots)
        grids.append(grid)
    params = replace(params, xqa_residual=grids[0], mmha_residual=grids[1])
    return OperatorFit(
        params=params,
        source=_source("decode attention", table, gpu),
        covers=_covers(table, ("batch_size", "kv_len")),
        **fit_quality(measured_s, _decode_seconds(table, gpu, params), left_out),
    )


def _decode_constants(
    table: Table, gpu: GpuSpec
) -> tuple[DecodeAttentionParams, NDArray[np.bool_]]:
    """Fit each kernel on the rows that it served; also return where XQA did."""
    dtype = str(table["kv_cache_dtype"][0])
    start = {name: bounds[0] for name, bounds in DECODE_BOUNDS.items()}
    params = DecodeAttentionParams(
        kv_bytes=KV_BYTES[dtype],
        xqa=start,
        mmha=start,
        xqa_min_blocks_per_sm=XQA_MIN_BLOCKS_PER_SM[dtype],
        window_padding_tokens=DECODE_WINDOW_PADDING,
    )
    on_xqa = runs_xqa(_heads(table), table["batch_size"], table["kv_len"], gpu=gpu, params=params)
    for kernel, rows in (("xqa", on_xqa), ("mmha", ~on_xqa)):
        if not rows.any():
            continue
        params = _with_kernel(_spread(select(table, rows)), gpu, params, kernel)
    return params, on_xqa


def _with_kernel(
    table: Table, gpu: GpuSpec, params: DecodeAttentionParams, kernel: str
) -> DecodeAttentionParams:
    """Fit the constants of one kernel, `xqa` or `mmha`, to rows that it served."""

    def build(constants: Mapping[str, float]) -> DecodeAttentionParams:
        if kernel == "xqa":
            return replace(params, xqa=constants)
        return replace(params, mmha=constants)

    return build(
        fit_constants(
            lambda constants: _decode_seconds(table, gpu, build(constants)),
            latency_s(table),
            DECODE_BOUNDS,
        )
    )


def _residual(
    table: Table, coordinates: tuple[FloatArray, ...], log_error: FloatArray, knots: _Knots
) -> tuple[ResidualGrid | None, FloatArray]:
    """Fit the grid to all rows; also return the error of each row when its shape is left out."""
    if not log_error.size:
        return None, log_error
    axes = _axes(coordinates, knots)
    configs = np.stack([table[name] for name in CONFIG], axis=1)
    left_out = np.zeros(log_error.size)
    for train, test in folds_by_key(configs):
        grid = fit_residual_grid(
            axes, [c[train] for c in coordinates], log_error[train], smoothness=SMOOTHNESS
        )
        left_out[test] = log_error[test] - grid.log_factor(*(c[test] for c in coordinates))
    return fit_residual_grid(axes, coordinates, log_error, smoothness=SMOOTHNESS), left_out


def _axes(coordinates: tuple[FloatArray, ...], knots: _Knots) -> tuple[FloatArray, ...]:
    _, heads, _, head_dim, windowed = (np.log2(c) for c in coordinates)
    octaves = np.arange(np.floor(heads.min()), np.ceil(heads.max()) + 1)
    return (
        np.log2(knots.lengths),
        np.sort(np.add.outer(octaves, np.log2(knots.head_steps)).ravel()),
        np.log2(knots.group_sizes),
        np.unique(head_dim),
        WINDOWED if windowed.max() > 0 else WINDOWED[:1],
    )


def _spread(table: Table) -> Table:
    """Every so manieth row, so that about `SUBSAMPLE` are left."""
    step = max(num_rows(table) // SUBSAMPLE, 1)
    return select(table, np.arange(num_rows(table)) % step == 0)


def _source(operator: str, table: Table, gpu: GpuSpec) -> str:
    return f"{operator} on {gpu.name}, TensorRT-LLM {table['framework_version'][0]}"


def _covers(table: Table, names: Iterable[str]) -> dict[str, tuple[float, float]]:
    return {n: (float(table[n].min()), float(table[n].max())) for n in (*CONFIG, *names)}
