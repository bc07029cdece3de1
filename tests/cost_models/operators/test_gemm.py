"""Linear layers: the physics of the form, its fit, and how well it does on shapes left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.fitting.gemm import fit_gemm, predict_gemm
from cost_models.operators.fit import params_from_json, params_to_json
from cost_models.operators.gemm import GemmParams, gemm_seconds
from cost_models.operators.grid import ResidualGrid
from cost_models.tables import Table, read_table, select
from tests.cost_models.operators.hopper import H100 as GPU

SHARED = Path(__file__).parents[3] / ".." / "shared" / "silicon"

BF16 = GemmParams(
    compute="bf16",
    weight_bytes=2.0,
    activation_bytes=2.0,
    launch_s=2.5e-6,
    cast_s=0.0,
    scale_s=0.0,
    quantize_bytes_per_s=0.0,
    compute_efficiency=0.9,
    hbm_efficiency=0.8,
    l2_speedup=2.5,
    l2_share=0.8,
    l2_sharpness=8.0,
    roofline_norm=3.5,
    sm_bytes_per_s=150e9,
    tile_s=0.5e-6,
    split_s=2.5e-6,
    wave_rounding=0.05,
    timed_warm=True,
)

FP8 = replace(
    BF16,
    compute="fp8",
    weight_bytes=1.0,
    activation_bytes=1.0,
    cast_s=1.3e-6,
    scale_s=7.2e-6,
    quantize_bytes_per_s=2.5e12,
)

sizes = st.integers(1, 70_000)


@given(m=sizes, n=sizes, k=sizes, params=st.sampled_from([BF16, FP8]))
def test_positive_and_slower_than_the_roofline(m: int, n: int, k: int, params: GemmParams) -> None:
    seconds = float(gemm_seconds(m, n, k, gpu=GPU, params=params))
    arithmetic_s = 2 * m * n * k / GPU.peak_flop_per_s(params.compute)
    assert np.isfinite(seconds)
    assert seconds > max(arithmetic_s, params.launch_s)


@given(m=sizes, n=sizes, k=sizes)
def test_cold_weights_cost_at_least_one_read_from_hbm(m: int, n: int, k: int) -> None:
    cold = gemm_seconds(m, n, k, gpu=GPU, params=BF16, weights_cold=True)
    assert cold >= gemm_seconds(m, n, k, gpu=GPU, params=BF16)
    assert cold >= 2 * n * k / GPU.hbm_bytes_per_s


@given(m=sizes, n=sizes, k=sizes, factor=st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(m: int, n: int, k: int, factor: float) -> None:
    faster = replace(GPU, hbm_bytes_per_s=GPU.hbm_bytes_per_s * factor)
    before = gemm_seconds(m, n, k, gpu=GPU, params=BF16)
    assert gemm_seconds(m, n, k, gpu=faster, params=BF16) <= before * (1 + 1e-12)


@given(m=sizes, n=sizes, k=sizes, more=st.integers(1, 5000), axis=st.integers(0, 2))
def test_more_work_is_never_faster(m: int, n: int, k: int, more: int, axis: int) -> None:
    larger = [m, n, k]
    larger[axis] += more
    before = gemm_seconds(m, n, k, gpu=GPU, params=BF16, weights_cold=True)
    after = gemm_seconds(*larger, gpu=GPU, params=BF16, weights_cold=True)
    assert after >= before * (1 - 1e-12)


def test_static_scales_leave_nothing_of_the_dynamic_quantization() -> None:
    m, n, k = 512, 8192, 4096
    dynamic = gemm_seconds(m, n, k, gpu=GPU, params=FP8)
    static = gemm_seconds(m, n, k, gpu=GPU, params=FP8, static_scales=True)
    saved_s = FP8.cast_s + FP8.scale_s + (2 + 2 + 1) * m * k / FP8.quantize_bytes_per_s
    assert dynamic - static == pytest.approx(saved_s)


def test_static_scales_change_nothing_where_the_cast_finds_block_scales() -> None:
    block = replace(FP8, scale_s=0.0)
    dynamic = gemm_seconds(512, 8192, 4096, gpu=GPU, params=block)
    assert dynamic == gemm_seconds(512, 8192, 4096, gpu=GPU, params=block, static_scales=True)


def test_weights_in_l2_are_faster_only_while_all_copies_fit() -> None:
    """Five copies of 4 MiB fit in 40 MB of L2; two of 32 MiB do not."""
    small, large = ((1, 2048, 1024), (1, 16384, 1024))

    def gain(shape: tuple[int, int, int]) -> float:
        warm = gemm_seconds(*shape, gpu=GPU, params=BF16)
        return float(gemm_seconds(*shape, gpu=GPU, params=BF16, weights_cold=True) / warm)

    assert gain(small) > 1.03
    assert gain(large) < 1.01


def test_padding_to_tiles_shows_as_steps() -> None:
    """Within a tile of rows a large layer costs the same; one row more takes another tile."""
    m = np.array([1025, 1152, 1153])
    inside, edge, beyond = gemm_seconds(m, 16384, 16384, gpu=GPU, params=BF16)
    assert edge / inside < 1.02
    assert beyond / edge > 1.03


def test_residual_multiplies() -> None:
    ones = tuple(np.array([0.0]) for _ in range(3))
    grid = ResidualGrid(axes=ones, values=np.full((1, 1, 1), np.log(1.25)))
    plain = gemm_seconds(7, 512, 512, gpu=GPU, params=BF16)
    assert gemm_seconds(7, 512, 512, gpu=GPU, params=replace(BF16, residual=grid)) == pytest.approx(
        1.25 * plain
    )


def test_broadcasts() -> None:
    m, n = np.arange(1, 5)[:, None], np.array([256, 512, 1024])
    assert gemm_seconds(m, n, 4096, gpu=GPU, params=BF16).shape == (4, 3)


def test_fit_recovers_what_the_form_simulated_and_survives_json() -> None:
    table = _simulated(FP8)
    fit = fit_gemm(table, GPU)["fp8"]
    assert fit.holdout_mape_pct < 1.0
    assert fit.num_points == table["m"].size
    again = params_from_json(GemmParams, json.loads(json.dumps(params_to_json(fit.params))))
    ours = gemm_seconds(33, 3000, 5000, gpu=GPU, params=fit.params)
    assert gemm_seconds(33, 3000, 5000, gpu=GPU, params=again) == pytest.approx(ours, rel=1e-3)
    # A pair (n, k) between the simulated ones:
    truth = gemm_seconds(33, 3000, 5000, gpu=GPU, params=FP8)
    assert ours == pytest.approx(truth, rel=0.05)


def test_rows_without_a_fit_are_nan() -> None:
    table = _simulated(FP8)
    assert np.isnan(predict_gemm(table, GPU, {})).all()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no operator tables beside the repository")
@pytest.mark.parametrize(("dtype", "bound_pct"), [("bfloat16", 4.0), ("fp8", 3.0)])
def test_pairs_left_out_stay_inside_the_bound(dtype: str, bound_pct: float) -> None:
    table = read_table(SHARED / "gemm.parquet")
    table = select(table, (table["system"] == "h200_sxm") & (table["dtype"] == dtype))
    n, k = (table[name].astype(np.int64) for name in "nk")
    left_out = (n * 31 + k) % 7 == 0
    gpu = replace(GPU, name="h200_sxm", hbm_bytes_per_s=4.8e12)
    fits = fit_gemm(select(table, ~left_out), gpu)
    unseen = select(table, left_out)
    measured_s = unseen["latency_us"].astype(np.float64) * 1e-6
    error = np.abs(predict_gemm(unseen, gpu, fits) / measured_s - 1)
    assert left_out.sum() > 1000
    assert error.mean() * 100 < bound_pct


def _simulated(params: GemmParams) -> Table:
    """A table of an 8-bit layer in which the form is exact."""
    lattice = np.array([256, 512, 1024, 2048, 4096, 8192, 16384])
    m, n, k = np.meshgrid(np.array([1, 16, 17, 64, 256, 2048]), lattice, lattice, indexing="ij")
    latency_us = gemm_seconds(m, n, k, gpu=GPU, params=params).ravel() * 1e6
    return {
        "dtype": np.full(m.size, "fp8"),
        "framework_version": np.full(m.size, "1.3.0"),
        "m": m.ravel(),
        "n": n.ravel(),
        "k": k.ravel(),
        "latency_us": latency_us,
    }
