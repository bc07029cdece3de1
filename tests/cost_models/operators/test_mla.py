"""Multi-head latent attention: its physics, and that fitting finds what was put in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cost_models.fitting.mla import (
    fit_mla_bmm,
    fit_mla_decode,
    fit_mla_prefill,
    predict_mla_bmm,
    predict_mla_decode,
    predict_mla_prefill,
)
from cost_models.gpu import GpuSpec
from cost_models.operators.fit import params_from_json, params_to_json
from cost_models.operators.mla import (
    MlaBmmParams,
    MlaDecodeParams,
    MlaPrefillParams,
    mla_bmm_seconds,
    mla_decode_seconds,
    mla_prefill_seconds,
)
from cost_models.tables import Table, read_table, select
from tests.cost_models.operators.hopper import H200

SHARED = Path(__file__).parents[4] / "shared" / "silicon"

PREFILL = MlaPrefillParams(
    compute="bf16",
    launch_s=13e-6,
    hbm_efficiency=0.9,
    latent_passes=1.5,
    compute_efficiency=0.63,
    tile_s=1e-6,
    longest_tile_share=0.8,
    norm=1.5,
)

DECODE = MlaDecodeParams(
    compute="bf16",
    kv_bytes=2,
    launch_s=13e-6,
    hbm_efficiency=0.9,
    compute_efficiency=0.65,
    sequence_s=3e-6,
    split_s=8e-6,
    split_tokens=4000,
    head_passes=2.0,
    norm=6,
)

BMM = MlaBmmParams(
    compute="bf16",
    weight_bytes=2,
    launch_s=4.3e-6,
    hbm_efficiency=0.9,
    compute_efficiency=0.4,
    tile_s=1e-6,
    norm=3,
)

heads = st.sampled_from([1, 8, 16, 128])
lengths = st.integers(1, 60_000)
batches = st.integers(1, 512)


def prefill(
    num_heads: int = 128, *, tokens: int = 1024, past: int = 0, num: int = 1, gpu: GpuSpec = H200
) -> float:
    return float(mla_prefill_seconds(num_heads, tokens, past, num, gpu=gpu, params=PREFILL))


def decode(
    num_heads: int = 128,
    *,
    num: int = 8,
    kv_len: int = 1024,
    gpu: GpuSpec = H200,
    params: MlaDecodeParams = DECODE,
) -> float:
    return float(mla_decode_seconds(num_heads, num, kv_len, gpu=gpu, params=params))


def bmm(num_heads: int = 128, *, tokens: int = 8, gpu: GpuSpec = H200) -> float:
    return float(mla_bmm_seconds(num_heads, tokens, gpu=gpu, params=BMM))


def test_long_prefill_runs_at_its_efficiency() -> None:
    tokens = 2**19
    flop = 2 * 128 * (192 + 128) * tokens * tokens / 2
    assert prefill(tokens=tokens) == pytest.approx(flop / (0.63 * 989.4e12), rel=0.01)


def test_decode_of_few_heads_streams_the_latents() -> None:
    cache_s = 256 * 65536 * 576 * 2 / (0.9 * 4.8e12)
    assert cache_s < decode(16, num=256, kv_len=65536) < 1.1 * cache_s


@given(num_heads=heads, tokens=lengths, past=lengths, num=batches)
def test_more_work_is_never_faster(num_heads: int, tokens: int, past: int, num: int) -> None:
    base = prefill(num_heads, tokens=tokens, past=past, num=num)
    assert 0 < base < np.inf
    assert prefill(2 * num_heads, tokens=tokens, past=past, num=num) >= base
    assert prefill(num_heads, tokens=tokens + 1, past=past, num=num) >= base
    assert prefill(num_heads, tokens=tokens, past=past + 1, num=num) >= base
    base = decode(num_heads, num=num, kv_len=tokens)
    assert 0 < base < np.inf
    assert decode(2 * num_heads, num=num, kv_len=tokens) >= base
    assert decode(num_heads, num=num + 1, kv_len=tokens) >= base
    assert decode(num_heads, num=num, kv_len=tokens + 1) >= base
    assert 0 < bmm(num_heads, tokens=num) <= bmm(num_heads, tokens=num + 1) < np.inf


@given(num_heads=heads, length=lengths, num=batches, speedup=st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(
    num_heads: int, length: int, num: int, speedup: float
) -> None:
    faster = replace(H200, hbm_bytes_per_s=H200.hbm_bytes_per_s * speedup)
    assert prefill(num_heads, tokens=length, num=num, gpu=faster) <= prefill(
        num_heads, tokens=length, num=num
    )
    assert decode(num_heads, kv_len=length, num=num, gpu=faster) <= decode(
        num_heads, kv_len=length, num=num
    )
    assert bmm(num_heads, tokens=num, gpu=faster) <= bmm(num_heads, tokens=num)


def test_an_fp8_cache_is_faster_where_memory_binds() -> None:
    fp8 = replace(DECODE, kv_bytes=1, compute="fp8")
    seconds = decode(16, num=256, kv_len=16384, params=fp8)
    assert seconds < 0.6 * decode(16, num=256, kv_len=16384)


@pytest.mark.parametrize("params", [PREFILL, DECODE, BMM])
def test_parameters_survive_json(params: Any) -> None:
    data = json.loads(json.dumps(params_to_json(params)))
    assert params_from_json(type(params), data) == params


def lattice(**axes: NDArray[np.generic]) -> Table:
    """All combinations of the axes, as rows of one BF16 table."""
    columns = np.meshgrid(*axes.values())
    table = {name: column.ravel() for name, column in zip(axes, columns, strict=True)}
    rows = columns[0].size
    constants = {"kv_cache_dtype": "bfloat16", "dtype": "bfloat16", "op": "mla_gen_pre"}
    return {
        **table,
        **{name: np.full(rows, value) for name, value in constants.items()},
        "framework_version": np.full(rows, "1.0"),
    }


ALL_HEADS = 2 ** np.arange(0, 8)
BATCHES = 2 ** np.arange(0, 9, 2)
LENGTHS = 2 ** np.arange(1, 15)


def test_fitting_simulated_prefill_returns_its_times() -> None:
    table = lattice(num_heads=ALL_HEADS, batch_size=BATCHES, seq_len=LENGTHS)
    seconds = mla_prefill_seconds(
        table["num_heads"], table["seq_len"], 0, table["batch_size"], gpu=H200, params=PREFILL
    )
    fits = fit_mla_prefill({**table, "latency_us": seconds * 1e6}, H200)
    np.testing.assert_allclose(predict_mla_prefill(table, H200, fits), seconds, rtol=0.02)


def test_fitting_simulated_decode_returns_its_times() -> None:
    table = lattice(num_heads=ALL_HEADS, batch_size=BATCHES, kv_len=LENGTHS)
    seconds = mla_decode_seconds(
        table["num_heads"], table["batch_size"], table["kv_len"], gpu=H200, params=DECODE
    )
    fits = fit_mla_decode({**table, "latency_us": seconds * 1e6}, H200)
    np.testing.assert_allclose(predict_mla_decode(table, H200, fits), seconds, rtol=0.02)


def test_fitting_simulated_absorption_returns_its_times() -> None:
    table = lattice(num_heads=ALL_HEADS, num_tokens=LENGTHS)
    seconds = mla_bmm_seconds(table["num_heads"], table["num_tokens"], gpu=H200, params=BMM)
    fits = fit_mla_bmm({**table, "latency_us": seconds * 1e6}, H200)
    np.testing.assert_allclose(predict_mla_bmm(table, H200, fits), seconds, rtol=0.02)


def test_one_absurd_row_does_not_bend_its_neighbours() -> None:
    table = lattice(num_heads=ALL_HEADS, batch_size=BATCHES, kv_len=LENGTHS)
    seconds = mla_decode_seconds(
        table["num_heads"], table["batch_size"], table["kv_len"], gpu=H200, params=DECODE
    )
    measured = seconds.copy()
    measured[100] *= 100
    fits = fit_mla_decode({**table, "latency_us": measured * 1e6}, H200)
    ratio = predict_mla_decode(table, H200, fits) / seconds
    assert np.quantile(np.abs(np.delete(ratio, 100) - 1), 0.99) < 0.1


@pytest.mark.skipif(not SHARED.is_dir(), reason="measured tables are not there")
@pytest.mark.parametrize("left_out_heads", [8, 16, 32])
@pytest.mark.parametrize(
    ("file", "fit", "predict", "bound_pct"),
    [
        ("mla_context", fit_mla_prefill, predict_mla_prefill, 7.0),
        ("mla_decode", fit_mla_decode, predict_mla_decode, 10.0),
    ],
)
def test_left_out_heads_stay_in_bounds(
    file: str,
    fit: Callable[..., Any],
    predict: Callable[..., Any],
    bound_pct: float,
    left_out_heads: int,
) -> None:
    table = read_table(SHARED / f"{file}.parquet")
    table = select(table, table["system"] == "h200_sxm")
    left_out: NDArray[np.bool_] = table["num_heads"] == left_out_heads
    fits = fit(select(table, ~left_out), H200)
    test = select(table, left_out)
    ratio = predict(test, H200, fits) / (test["latency_us"].astype(np.float64) * 1e-6)
    assert 100 * np.mean(np.abs(ratio - 1)) < bound_pct
