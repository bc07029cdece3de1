"""Fits `MoeParams` to tables of measured mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.fitting.constants import Bounds, fit_constants
from cost_models.fitting.grid import fit_residual_grid
from cost_models.fitting.quality import fit_quality, folds_by_key
from cost_models.gpu import GpuSpec
from cost_models.operators.fit import OperatorFit
from cost_models.operators.grid import ResidualGrid
from cost_models.operators.moe import MoeParams, MoeShape, expert_load, loaded_moe_seconds
from cost_models.operators.routing import RankLoad
from cost_models.tables import Table, latency_s, num_rows, select

FloatArray = NDArray[np.float64]

SUBSAMPLE = 300
"""Configurations on which the physical constants are fitted; the residual sees all."""

SMOOTHNESS = 0.2
"""Weight of the residual grid's smoothness, chosen by cross-validation."""

LARGEST_RESIDUAL = 0.6
"""Log error beyond which a row is an untuned kernel rather than the shape's own time."""

SHAPE_COLUMNS = ("hidden_size", "inter_size", "topk", "num_experts")
SPLIT_COLUMNS = ("moe_tp_size", "moe_ep_size")

BOUNDS: Bounds = {
    "launch_s": (2e-5, 1e-6, 3e-4),
    "choice_s": (1e-7, 1e-10, 1e-5),
    "pair_s": (1e-9, 1e-13, 1e-6),
    "logit_s": (1e-8, 1e-12, 1e-6),
    "expert_s": (1e-7, 1e-10, 5e-6),
    "compute_efficiency": (0.6, 0.05, 1.05),
    "hbm_efficiency": (0.8, 0.3, 0.98),
    "l2_speedup": (2.0, 1.0, 8.0),
    "roofline_norm": (3.0, 1.0, 8.0),
    "tile_rows": (32.0, 0.1, 256.0),
    "narrow_width": (64.0, 1.0, 2000.0),
    "plain_factor": (1.1, 0.8, 2.0),
    "activation_efficiency": (0.5, 0.05, 3.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """What is known of a dtype before fitting."""

    compute: str
    weight_bits: float


FORMATS: Mapping[str, _Format] = {
    "bfloat16": _Format(compute="bf16", weight_bits=16),
    "fp8": _Format(compute="fp8", weight_bits=8),
    "fp8_block": _Format(compute="fp8", weight_bits=8),
    "nvfp4": _Format(compute="fp4", weight_bits=4.5),
    "nvfp4/min_latency": _Format(compute="fp4", weight_bits=4.5),
    "w4a16_mxfp4": _Format(compute="bf16", weight_bits=4.25),
    "w4a8_mxfp4_mxfp8": _Format(compute="fp8", weight_bits=4.25),
}


def fit_moe(table: Table, gpu: GpuSpec) -> dict[str, OperatorFit[MoeParams]]:
    """Return the fitted constants by dtype; kernels for few tokens as `dtype/min_latency`.

    Args:
        table: Rows of one system; those flagged `suspect_slow_config` are left out.
        gpu: The system's datasheet.
    """
    table = _untuned_left_out(table)
    keys = _keys(table)
    return {
        str(key): _fit_key(select(table, keys == key), gpu, str(key)) for key in np.unique(keys)
    }


def predict_moe(
    table: Table, gpu: GpuSpec, fits: Mapping[str, OperatorFit[MoeParams]]
) -> FloatArray:
    """Return the predicted seconds of every row; NaN where no fit serves its dtype."""
    seconds = np.full(num_rows(table), np.nan)
    keys = _keys(table)
    for key, fit in fits.items():
        rows = keys == key
        if rows.any():
            seconds[rows] = _predict(select(table, rows), gpu, fit.params)
    return seconds


def _fit_key(table: Table, gpu: GpuSpec, key: str) -> OperatorFit[MoeParams]:
    measured_s = latency_s(table)
    params = _fit_constants(table, gpu, key)
    log_error = np.log(measured_s / _predict(table, gpu, params))
    left_out = np.zeros(log_error.size)
    layers = np.stack([table[column] for column in SHAPE_COLUMNS], axis=1)
    for train, test in folds_by_key(layers):
        grid = _fit_grid(select(table, train), log_error[train], axes_of=table)
        left_out[test] = log_error[test] - grid.log_factor(*_coordinates(select(table, test)))
    params = replace(params, residual=_fit_grid(table, log_error, axes_of=table))
    return OperatorFit(
        params=params,
        source=f"{key} MoE on {gpu.name}, TensorRT-LLM {table['framework_version'][0]}",
        covers={
            name: (float(table[name].min()), float(table[name].max()))
            for name in ("num_tokens", *SHAPE_COLUMNS, *SPLIT_COLUMNS)
        },
        **fit_quality(measured_s, _predict(table, gpu, params), left_out),
    )


def _fit_constants(table: Table, gpu: GpuSpec, key: str) -> MoeParams:
    """Least squares on log error over whole configurations spread over the table."""
    form = FORMATS[key]
    _, configuration = np.unique(_configurations(table), axis=0, return_inverse=True)
    step = max(int(configuration.max()) // SUBSAMPLE, 1)
    sample = select(table, configuration.ravel() % step == 0)

    def build(constants: Mapping[str, float]) -> MoeParams:
        return MoeParams(
            compute=form.compute, weight_bits=form.weight_bits, residual=None, **constants
        )

    layers = list(_layers(sample))
    constants = fit_constants(
        lambda constants: _seconds(layers, gpu, build(constants)),
        latency_s(sample),
        BOUNDS,
    )
    return build(constants)


def _fit_grid(table: Table, log_error: FloatArray, *, axes_of: Table) -> ResidualGrid:
    tokens, experts, width, choices, popularity = _coordinates(axes_of)
    axes = (
        _octaves(tokens, 1.0),
        _octaves(experts, 2.0),
        _octaves(width, 2.0),
        _octaves(choices, 1.0),
        np.unique(np.log2(popularity)),
    )
    tame = np.clip(log_error, -LARGEST_RESIDUAL, LARGEST_RESIDUAL)
    return fit_residual_grid(axes, _coordinates(table), tame, smoothness=SMOOTHNESS)


def _coordinates(table: Table) -> tuple[FloatArray, ...]:
    """Where the residual of each row is looked up, as `MoeParams.residual` says."""
    names = ("num_tokens", "num_experts", "moe_ep_size", "inter_size", "moe_tp_size", "topk")
    tokens, experts, ep, inter, tp, top_k = (table[name].astype(np.float64) for name in names)
    return tokens, np.ceil(experts / ep), np.ceil(inter / tp), top_k, 1 + _alpha(table)


def _predict(table: Table, gpu: GpuSpec, params: MoeParams) -> FloatArray:
    return _seconds(list(_layers(table)), gpu, params)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer that was timed, and what each of its rows brings to the busiest rank."""

    shape: MoeShape
    power_law_alpha: float
    load: RankLoad
    rows: NDArray[np.intp]


def _seconds(layers: Sequence[_Layer], gpu: GpuSpec, params: MoeParams) -> FloatArray:
    """Return the seconds of every row of a table that was divided into layers."""
    seconds = np.full(sum(layer.rows.size for layer in layers), np.nan)
    for layer in layers:
        seconds[layer.rows] = loaded_moe_seconds(
            layer.shape,
            layer.load,
            gpu=gpu,
            params=params,
            power_law_alpha=layer.power_law_alpha,
        )
    return seconds


def _layers(table: Table) -> Iterator[_Layer]:
    """Yield each layer with its expert popularity and the rows that timed it."""
    distinct, inverse = np.unique(_configurations(table), axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    bounds = np.searchsorted(inverse.ravel()[order], np.arange(len(distinct) + 1))
    for number, (hidden, inter, top_k, experts, tp, ep, gated, alpha) in enumerate(distinct):
        shape = MoeShape(
            hidden_size=int(hidden),
            inter_size=int(inter),
            top_k=int(top_k),
            num_experts=int(experts),
            moe_tp_size=int(tp),
            moe_ep_size=int(ep),
            gated=bool(gated),
        )
        rows = order[bounds[number] : bounds[number + 1]]
        yield _Layer(
            shape=shape,
            power_law_alpha=float(alpha),
            load=expert_load(shape, table["num_tokens"][rows], float(alpha)),
            rows=rows,
        )


def _configurations(table: Table) -> FloatArray:
    """Everything that tells layers apart, one row of numbers for each row of the table."""
    gated = np.char.find(table["kernel_source"].astype(str), "nongated") < 0
    columns = [table[c].astype(np.float64) for c in (*SHAPE_COLUMNS, *SPLIT_COLUMNS)]
    return np.stack([*columns, gated.astype(np.float64), _alpha(table)], axis=1)


def _alpha(table: Table) -> FloatArray:
    """Exponent in `power_law_1.01`; 0 for `balanced`."""
    names = table["distribution"].astype(str)
    alpha = np.zeros(names.size)
    for name in np.unique(names):
        if name.startswith("power_law_"):
            alpha[names == name] = float(name.removeprefix("power_law_"))
    return alpha


def _keys(table: Table) -> NDArray[np.str_]:
    dtypes = table["dtype"].astype(str)
    few_tokens = np.char.find(table["kernel_source"].astype(str), "min_latency") >= 0
    return np.where(few_tokens, np.char.add(dtypes, "/min_latency"), dtypes)


def _untuned_left_out(table: Table) -> Table:
    if "suspect_slow_config" not in table:
        return table
    suspect = np.isin(table["suspect_slow_config"].astype(str), ("True", "1", "true"))
    return select(table, ~suspect)


def _octaves(values: FloatArray, octaves: float) -> FloatArray:
    """Return evenly spaced log2 knots from the smallest to the largest value."""
    low, high = np.log2(values.min()), np.log2(values.max())
    if high <= low:
        return np.array([low])
    return np.linspace(low, high, max(round((high - low) / octaves), 1) + 1)
