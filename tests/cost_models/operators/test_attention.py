"""Prefill and decode attention: their physics, and that fitting finds what was put in."""

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

from cost_models.fitting.attention import (
    fit_attention_decode,
    fit_attention_prefill,
    predict_attention_decode,
    predict_attention_prefill,
)
from cost_models.gpu import GpuSpec
from cost_models.operators.attention import (
    AttentionHeads,
    DecodeAttentionParams,
    PrefillAttentionParams,
    decode_attention_seconds,
    prefill_attention_seconds,
    runs_xqa,
)
from cost_models.operators.fit import params_from_json, params_to_json
from cost_models.operators.flash import TILE_TOKENS, visited_keys
from cost_models.operators.grid import ResidualGrid
from cost_models.tables import Table, read_table, select
from tests.cost_models.operators.hopper import H200

SHARED = Path(__file__).parents[4] / "shared" / "silicon"

PREFILL = PrefillAttentionParams(
    compute="bf16",
    kv_bytes=2,
    launch_s=12e-6,
    hbm_efficiency=0.7,
    compute_efficiency={"64": 0.45, "128": 0.6, "256": 0.65},
    tile_s=2e-6,
    longest_tile_share=0.8,
    norm=1.4,
    window_padding_tokens=200,
)

KERNEL = {
    "launch_s": 6e-6,
    "block_s": 3e-6,
    "sm_speed": 1.5,
    "hbm_efficiency": 0.92,
    "l2_speedup": 2.0,
    "l2_share": 0.8,
    "split_tokens": 256.0,
    "split_blocks_per_sm": 2.0,
    "merge_s": 2e-6,
    "norm": 2.5,
}

DECODE = DecodeAttentionParams(
    kv_bytes=2,
    xqa=KERNEL,
    mmha={**KERNEL, "launch_s": 7e-6, "block_s": 1.2e-6},
    xqa_min_blocks_per_sm=0.25,
    window_padding_tokens=64,
)

LLAMA_8B = AttentionHeads(num_heads=32, num_kv_heads=8, head_dim=128)

lengths = st.integers(1, 40_000)
batches = st.integers(1, 512)


def prefill(
    shape: AttentionHeads = LLAMA_8B,
    *,
    tokens: int = 1024,
    past: int = 0,
    num: int = 1,
    gpu: GpuSpec = H200,
    params: PrefillAttentionParams = PREFILL,
) -> float:
    return float(prefill_attention_seconds(shape, tokens, past, num, gpu=gpu, params=params))


def decode(
    shape: AttentionHeads = LLAMA_8B,
    *,
    num: int = 8,
    kv_len: int = 1024,
    gpu: GpuSpec = H200,
    params: DecodeAttentionParams = DECODE,
) -> float:
    return float(decode_attention_seconds(shape, num, kv_len, gpu=gpu, params=params))


@given(tokens=lengths, past=st.integers(0, 40_000), reach=st.integers(129, 50_000))
def test_visited_keys_is_the_sum_over_tiles(tokens: int, past: int, reach: int) -> None:
    tiles = -(-tokens // TILE_TOKENS)
    expected = sum(min(past + TILE_TOKENS * i, reach) for i in range(1, tiles + 1))
    assert visited_keys(np.asarray(tokens, float), np.asarray(past, float), reach) == expected


def test_long_prefill_runs_at_the_efficiency_of_its_head_dim() -> None:
    tokens = 2**20
    flop = 4 * 32 * 128 * tokens * tokens / 2
    assert prefill(tokens=tokens) == pytest.approx(flop / (0.6 * 989.4e12), rel=0.01)


def test_large_decode_streams_its_cache_at_hbm_speed() -> None:
    cache_bytes = 512 * 32768 * 2 * 8 * 128 * 2
    seconds = decode(num=512, kv_len=32768)
    assert cache_bytes / 4.8e12 < seconds < 1.3 * cache_bytes / (0.92 * 4.8e12)


@given(tokens=lengths, past=lengths, num=batches)
def test_more_prefill_work_is_never_faster(tokens: int, past: int, num: int) -> None:
    base = prefill(tokens=tokens, past=past, num=num)
    assert 0 < base < np.inf
    assert prefill(tokens=tokens + 64, past=past, num=num) >= base
    assert prefill(tokens=tokens, past=past + 64, num=num) >= base
    assert prefill(tokens=tokens, past=past, num=num + 1) >= base


@given(kv_len=lengths, num=batches)
def test_more_decode_work_is_never_faster(kv_len: int, num: int) -> None:
    group_of_one = AttentionHeads(num_heads=8, num_kv_heads=8, head_dim=128)
    base = decode(group_of_one, num=num, kv_len=kv_len)
    assert 0 < base < np.inf
    assert decode(group_of_one, num=num, kv_len=2 * kv_len) >= base
    merge_s = KERNEL["merge_s"]  # fewer splits are merged when more sequences fill the GPU
    assert decode(group_of_one, num=num + 1, kv_len=kv_len) >= base - merge_s


@given(length=lengths, num=batches, speedup=st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(length: int, num: int, speedup: float) -> None:
    faster = replace(H200, hbm_bytes_per_s=H200.hbm_bytes_per_s * speedup)
    assert prefill(tokens=length, num=num, gpu=faster) <= prefill(tokens=length, num=num)
    assert decode(kv_len=length, num=num, gpu=faster) <= decode(kv_len=length, num=num)


@given(length=lengths, num=batches, window=st.integers(1, 8192))
def test_a_window_never_adds_work(length: int, num: int, window: int) -> None:
    windowed = AttentionHeads(num_heads=32, num_kv_heads=8, head_dim=128, window_size=window)
    assert prefill(windowed, tokens=length, num=num) <= prefill(tokens=length, num=num)
    assert decode(windowed, kv_len=length, num=num) <= decode(kv_len=length, num=num)


@given(chunks=st.integers(2, 16))
def test_chunks_of_a_prompt_cost_at_least_the_whole(chunks: int) -> None:
    size = 1024
    pieces = sum(prefill(tokens=size, past=i * size) for i in range(chunks))
    assert pieces >= prefill(tokens=chunks * size)


def test_a_chunk_is_cheaper_than_the_prompt_it_completes() -> None:
    whole, tail = prefill(tokens=8192), prefill(tokens=512, past=7680)
    assert 512 / 8192 < tail / whole < 0.35


def test_fewer_kv_bits_are_faster_where_memory_binds() -> None:
    fp8 = replace(DECODE, kv_bytes=1)
    assert decode(num=256, kv_len=8192, params=fp8) < 0.6 * decode(num=256, kv_len=8192)


def test_a_cold_cache_is_slower_only_where_it_fits_l2() -> None:
    def ratio(kv_len: int) -> float:
        cold = decode_attention_seconds(
            LLAMA_8B, 64, kv_len, gpu=H200, params=DECODE, cache_cold=True
        )
        return float(cold) / decode(num=64, kv_len=kv_len)

    assert ratio(100) > 1.01
    assert ratio(32768) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "num", "kv_len", "xqa"),
    [
        (32, 8, 2, 512, True),
        (32, 8, 1, 512, False),  # 8 KV heads × 4 blocks fill less than a quarter of 132 SMs
        (32, 8, 1, 1024, True),
        (8, 8, 64, 8192, False),  # one query head per KV head
        (64, 1, 64, 8192, False),  # 64 query heads per KV head
        (32, 1, 64, 8192, True),
    ],
)
def test_kernel_choice_follows_the_engine(
    heads: int, kv_heads: int, num: int, kv_len: int, xqa: bool
) -> None:
    shape = AttentionHeads(num_heads=heads, num_kv_heads=kv_heads, head_dim=128)
    assert bool(runs_xqa(shape, num, kv_len, gpu=H200, params=DECODE)) is xqa


def test_arguments_broadcast() -> None:
    shape = AttentionHeads(num_heads=np.array([[8], [32]]), num_kv_heads=8, head_dim=128)
    lengths_ = np.array([1, 100, 5000])
    assert prefill_attention_seconds(shape, lengths_, 0, 4, gpu=H200, params=PREFILL).shape == (
        2,
        3,
    )
    assert decode_attention_seconds(shape, 4, lengths_, gpu=H200, params=DECODE).shape == (2, 3)


def test_a_residual_scales_the_formula() -> None:
    axes = tuple(np.array([0.0]) for _ in range(5))
    grid = ResidualGrid(axes=axes, values=np.full((1, 1, 1, 1, 1), np.log(1.5)))
    assert prefill(params=replace(PREFILL, residual=grid)) == pytest.approx(1.5 * prefill())
    both = replace(DECODE, xqa_residual=grid, mmha_residual=grid)
    assert decode(params=both) == pytest.approx(1.5 * decode())


@pytest.mark.parametrize(("cls", "params"), [
    (PrefillAttentionParams, PREFILL), (DecodeAttentionParams, DECODE),
])  # fmt: skip
def test_parameters_survive_json(cls: type[Any], params: Any) -> None:
    assert params_from_json(cls, json.loads(json.dumps(params_to_json(params)))) == params


def lattice(length: str) -> Table:
    """All combinations of some heads, batches and lengths."""
    heads, group, batch, size, head_dim = (
        axis.ravel()
        for axis in np.meshgrid(
            [8, 16, 32, 64], [1, 4, 8], [1, 4, 16, 64], 2 ** np.arange(5, 14), [64, 128, 256]
        )
    )
    return {
        "attn_dtype": np.full(heads.size, "bfloat16"),
        "kv_cache_dtype": np.full(heads.size, "bfloat16"),
        "framework_version": np.full(heads.size, "1.0"),
        "num_heads": heads,
        "num_kv_heads": heads // group,
        "head_dim": head_dim,
        "window_size": np.zeros_like(heads),
        "batch_size": batch,
        length: size,
    }


def heads_of(table: Table) -> AttentionHeads:
    names = ("num_heads", "num_kv_heads", "head_dim", "window_size")
    return AttentionHeads(**{name: table[name] for name in names})


def test_fitting_simulated_prefill_returns_its_times() -> None:
    table = lattice("seq_len")
    seconds = prefill_attention_seconds(
        heads_of(table), table["seq_len"], 0, table["batch_size"], gpu=H200, params=PREFILL
    )
    table["latency_us"] = seconds * 1e6
    fits = fit_attention_prefill(table, H200)
    assert fits["bfloat16"].holdout_mape_pct < 1.0
    assert fits["bfloat16"].params.compute_efficiency["128"] == pytest.approx(0.6, rel=0.05)
    predicted = predict_attention_prefill(table, H200, fits)
    np.testing.assert_allclose(predicted, seconds, rtol=0.05)


def test_fitting_simulated_decode_returns_its_times() -> None:
    table = lattice("kv_len")
    seconds = decode_attention_seconds(
        heads_of(table), table["batch_size"], table["kv_len"], gpu=H200, params=DECODE
    )
    table["latency_us"] = seconds * 1e6
    fits = fit_attention_decode(table, H200)
    assert fits["bfloat16"].holdout_mape_pct < 2.0
    np.testing.assert_allclose(predict_attention_decode(table, H200, fits), seconds, rtol=0.1)


def test_suspect_rows_are_not_fitted() -> None:
    table = lattice("kv_len")
    table["latency_us"] = np.full(table["kv_len"].size, 10.0)
    table["kv_bandwidth_suspect"] = np.full(table["kv_len"].size, True)
    assert fit_attention_decode(table, H200) == {}


def test_rows_without_a_fit_are_nan() -> None:
    table = lattice("kv_len")
    assert np.isnan(predict_attention_decode(table, H200, {})).all()
    prompts = lattice("seq_len")
    assert np.isnan(predict_attention_prefill(prompts, H200, {})).all()


@pytest.mark.skipif(not SHARED.is_dir(), reason="measured tables are not there")
@pytest.mark.parametrize(
    ("file", "fit", "predict", "bound_pct"),
    [
        ("attention_context", fit_attention_prefill, predict_attention_prefill, 4.0),
        ("attention_decode", fit_attention_decode, predict_attention_decode, 8.0),
    ],
)
def test_left_out_head_configurations_stay_in_bounds(
    file: str, fit: Callable[..., Any], predict: Callable[..., Any], bound_pct: float
) -> None:
    table = read_table(SHARED / f"{file}.parquet")
    table = select(
        table,
        (table["system"] == "h200_sxm")
        & (table["attn_dtype"] == "bfloat16")
        & (table["kv_cache_dtype"] == "bfloat16")
        & (table["head_dim"] == 128)
        & (table["window_size"] == 0),
    )
    heads, kv_heads = (table[n].astype(np.int64) for n in ("num_heads", "num_kv_heads"))
    left_out = (7 * heads + kv_heads) % 5 == 0
    fits = fit(select(table, ~left_out), H200)
    test = select(table, left_out)
    ratio = predict(test, H200, fits) / (test["latency_us"].astype(np.float64) * 1e-6)
    assert len(ratio) > 500
    assert 100 * np.mean(np.abs(ratio - 1)) < bound_pct
