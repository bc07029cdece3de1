"""Experts: the physics of the form, its fit, and how well it does on layers left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cost_models.fitting.moe import fit_moe, predict_moe
from cost_models.operators.fit import params_from_json, params_to_json
from cost_models.operators.grid import ResidualGrid
from cost_models.operators.moe import MoeParams, MoeShape, moe_seconds
from cost_models.tables import Table, read_table, select
from tests.cost_models.operators.hopper import H100 as GPU

SHARED = Path(__file__).parents[3] / ".." / "shared" / "silicon"

BF16 = MoeParams(
    compute="bf16",
    weight_bits=16.0,
    launch_s=25e-6,
    choice_s=0.4e-6,
    pair_s=0.3e-9,
    logit_s=9e-9,
    expert_s=1e-8,
    compute_efficiency=0.8,
    hbm_efficiency=0.9,
    l2_speedup=2.0,
    roofline_norm=2.0,
    tile_rows=16.0,
    narrow_width=100.0,
    plain_factor=1.1,
    activation_efficiency=0.8,
)

QWEN3_30B = MoeShape(
    hidden_size=2048, inter_size=768, top_k=8, num_experts=128, moe_tp_size=1, moe_ep_size=1
)
MIXTRAL_8X7B = MoeShape(
    hidden_size=4096, inter_size=14336, top_k=2, num_experts=8, moe_tp_size=1, moe_ep_size=1
)

shapes = st.builds(
    MoeShape,
    hidden_size=st.integers(256, 16_384),
    inter_size=st.integers(64, 32_768),
    top_k=st.integers(1, 8),
    num_experts=st.sampled_from([8, 16, 60, 128, 384]),
    moe_tp_size=st.sampled_from([1, 2, 4, 8]),
    moe_ep_size=st.sampled_from([1, 2, 4]),
    gated=st.booleans(),
)
tokens = st.integers(1, 200_000)
alphas = st.sampled_from([0.0, 1.01, 1.2])


@given(shape=shapes, num_tokens=tokens, alpha=alphas)
def test_positive_and_slower_than_the_roofline(
    shape: MoeShape, num_tokens: int, alpha: float
) -> None:
    seconds = moe_seconds(shape, num_tokens, gpu=GPU, params=BF16, power_law_alpha=alpha)
    pairs = num_tokens * shape.top_k / shape.moe_ep_size
    assert np.isfinite(seconds)
    assert seconds > 2 * pairs * shape.local_weights / GPU.peak_flop_per_s("bf16")
    assert seconds > BF16.launch_s


@given(shape=shapes, alpha=alphas, num_tokens=tokens, more=st.integers(1, 5000))
def test_more_tokens_are_never_faster(
    shape: MoeShape, alpha: float, num_tokens: int, more: int
) -> None:
    before, after = moe_seconds(
        shape, [num_tokens, num_tokens + more], gpu=GPU, params=BF16, power_law_alpha=alpha
    )
    assert after >= before * (1 - 1e-12)


@given(shape=shapes, num_tokens=tokens, factor=st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(shape: MoeShape, num_tokens: int, factor: float) -> None:
    faster = replace(GPU, hbm_bytes_per_s=GPU.hbm_bytes_per_s * factor)
    before = moe_seconds(shape, num_tokens, gpu=GPU, params=BF16)
    assert moe_seconds(shape, num_tokens, gpu=faster, params=BF16) <= before


@given(shape=shapes, num_tokens=tokens, extra=st.integers(1, 4096))
def test_wider_experts_are_never_faster(shape: MoeShape, num_tokens: int, extra: int) -> None:
    wider = replace(shape, inter_size=shape.inter_size + extra * shape.moe_tp_size)
    before = moe_seconds(shape, num_tokens, gpu=GPU, params=BF16)
    assert moe_seconds(wider, num_tokens, gpu=GPU, params=BF16) >= before * (1 - 1e-12)


@given(shape=shapes, num_tokens=tokens, bits=st.floats(3.0, 16.0))
def test_fewer_weight_bits_are_never_slower(shape: MoeShape, num_tokens: int, bits: float) -> None:
    narrow = moe_seconds(shape, num_tokens, gpu=GPU, params=BF16, weight_bits=bits)
    assert narrow <= moe_seconds(shape, num_tokens, gpu=GPU, params=BF16)


@given(num_tokens=st.integers(1024, 100_000))
def test_a_hot_rank_is_slower_than_an_even_one(num_tokens: int) -> None:
    split = replace(QWEN3_30B, moe_ep_size=8)
    even, mild, steep = (
        moe_seconds(split, num_tokens, gpu=GPU, params=BF16, power_law_alpha=alpha)
        for alpha in (0.0, 1.01, 1.2)
    )
    assert even < mild < steep


def test_one_token_reads_the_weights_of_its_own_experts() -> None:
    """Mixtral 8x7B: 2 experts of 3·4096·14336 weights, 705 MB in BF16."""
    bare = replace(BF16, hbm_efficiency=1.0, l2_speedup=1.0)
    seconds = moe_seconds(MIXTRAL_8X7B, 1, gpu=GPU, params=bare)
    assert seconds == pytest.approx(704.6e6 / GPU.hbm_bytes_per_s, rel=0.15)


def test_an_ungated_expert_has_two_thirds_of_the_weights() -> None:
    plain = replace(MIXTRAL_8X7B, gated=False)
    assert plain.local_weights * 3 == MIXTRAL_8X7B.local_weights * 2
    assert moe_seconds(plain, 64, gpu=GPU, params=BF16) < moe_seconds(
        MIXTRAL_8X7B, 64, gpu=GPU, params=BF16
    )


def test_uneven_splits_round_up() -> None:
    uneven = replace(QWEN3_30B, inter_size=700, moe_tp_size=8, num_experts=60, moe_ep_size=8)
    assert (uneven.local_inter_size, uneven.local_experts) == (88, 8)


def test_residual_multiplies() -> None:
    one_knot = tuple(np.array([0.0]) for _ in range(5))
    grid = ResidualGrid(axes=one_knot, values=np.full((1,) * 5, np.log(1.25)))
    plain = moe_seconds(QWEN3_30B, [1, 77], gpu=GPU, params=BF16)
    corrected = moe_seconds(QWEN3_30B, [1, 77], gpu=GPU, params=replace(BF16, residual=grid))
    assert corrected == pytest.approx(1.25 * plain)


def test_keeps_the_shape_of_its_tokens() -> None:
    assert moe_seconds(QWEN3_30B, np.ones((3, 4)), gpu=GPU, params=BF16).shape == (3, 4)


def test_fit_recovers_what_the_form_simulated_and_survives_json() -> None:
    table = _simulated()
    fit = fit_moe(table, GPU)["bfloat16"]
    assert fit.mape_pct < 1.0
    assert fit.holdout_mape_pct < 3.0
    assert fit.num_points == table["num_tokens"].size
    again = params_from_json(MoeParams, json.loads(json.dumps(params_to_json(fit.params))))
    unseen = replace(QWEN3_30B, inter_size=1024, moe_tp_size=2)
    ours = moe_seconds(unseen, [7, 700], gpu=GPU, params=fit.params)
    assert moe_seconds(unseen, [7, 700], gpu=GPU, params=again) == pytest.approx(ours, rel=1e-3)
    truth = moe_seconds(unseen, [7, 700], gpu=GPU, params=BF16)
    assert ours == pytest.approx(truth, rel=0.05)


def test_flagged_rows_are_left_out_of_the_fit() -> None:
    table = _simulated()
    slow = np.arange(table["num_tokens"].size) % 10 == 0
    table["latency_us"] = np.where(slow, 5 * table["latency_us"].astype(float), table["latency_us"])
    table["suspect_slow_config"] = slow
    fit = fit_moe(table, GPU)["bfloat16"]
    assert fit.num_points == np.sum(~slow)
    assert fit.mape_pct < 1.0


def test_kernels_for_few_tokens_have_their_own_key() -> None:
    table = _simulated()
    few = np.arange(table["num_tokens"].size) % 2 == 0
    table["kernel_source"] = np.where(few, "moe_torch_flow_min_latency", "moe_torch_flow_cutlass")
    table["dtype"] = np.full(few.size, "nvfp4")
    gpu = replace(GPU, flop_per_s={**GPU.flop_per_s, "fp4": 4e15})
    fits = fit_moe(table, gpu)
    assert set(fits) == {"nvfp4", "nvfp4/min_latency"}
    assert np.isnan(predict_moe(table, gpu, {"nvfp4": fits["nvfp4"]})).tolist() == few.tolist()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no operator tables beside the repository")
def test_layers_left_out_stay_inside_the_bound() -> None:
    table = read_table(SHARED / "moe.parquet")
    usable = table["suspect_slow_config"].astype(int) == 0
    table = select(
        table, (table["system"] == "h200_sxm") & (table["dtype"] == "fp8_block") & usable
    )
    layer = table["hidden_size"].astype(int) * 1000 + table["num_experts"].astype(int)
    left_out = np.isin(layer, [2048 * 1000 + 128, 4096 * 1000 + 8, 6144 * 1000 + 160])
    gpu = replace(GPU, name="h200_sxm", hbm_bytes_per_s=4.8e12)
    unseen = select(table, left_out)
    every_eighth = np.arange(left_out.size) % 8 == 0
    fits = fit_moe(select(table, ~left_out & every_eighth), gpu)
    measured_s = unseen["latency_us"].astype(np.float64) * 1e-6
    error = np.abs(predict_moe(unseen, gpu, fits) / measured_s - 1)
    assert left_out.sum() > 1000
    assert error.mean() * 100 < 7.0


def _simulated() -> Table:
    """A table of layers in which the form is exact."""
    lattice = [
        (replace(QWEN3_30B, hidden_size=h, inter_size=i, top_k=k, num_experts=e), tp, ep, alpha)
        for h, i in ((1024, 512), (2048, 768), (4096, 1536), (6144, 4096))
        for k, e in ((2, 8), (4, 32), (8, 128))
        for tp, ep in ((1, 1), (4, 1), (1, 4))
        for alpha in (0.0, 1.01)
    ]
    num_tokens = np.array([1, 4, 16, 64, 256, 1024, 4096])
    columns: dict[str, list[NDArray[Any]]] = {}
    for layer, tp, ep, alpha in lattice:
        shape = replace(layer, moe_tp_size=tp, moe_ep_size=ep)
        seconds = moe_seconds(shape, num_tokens, gpu=GPU, params=BF16, power_law_alpha=alpha)
        cells: dict[str, Any] = {
            "hidden_size": shape.hidden_size,
            "inter_size": shape.inter_size,
            "topk": shape.top_k,
            "num_experts": shape.num_experts,
            "moe_tp_size": tp,
            "moe_ep_size": ep,
            "num_tokens": num_tokens,
            "latency_us": seconds * 1e6,
            "dtype": "bfloat16",
            "kernel_source": "moe_torch_flow_cutlass",
            "distribution": "balanced" if not alpha else f"power_law_{alpha}",
            "framework_version": "1.3.0",
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(np.broadcast_to(cell, num_tokens.shape))
    return {name: np.concatenate(parts) for name, parts in columns.items()}
