"""What fusing saves: bytes counted by hand, laws, and the table that was measured on an H200."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.fusion import Traffic, norm_traffic, swiglu_traffic, unfused_score_traffic
from cost_models.profile_io import load_gpu
from cost_models.tables import latency_s, read_table
from engines.registry import load_calibration

TABLES = Path(__file__).parents[2] / "profiles/microbench"


def test_a_prefill_writes_and_reads_its_scores() -> None:
    """Scores of 2 bytes: out, in and out for the mask, the same for softmax, in."""
    traffic = unfused_score_traffic(32, 1024, 1024)
    assert traffic.bytes_moved == 32 * 1024**2 * 2 * (1 + 2 + 2 + 1)
    assert traffic.kernels == 4


def test_a_decode_step_has_no_mask() -> None:
    traffic = unfused_score_traffic(32 * 64, 1, 4096)
    assert traffic.bytes_moved == 32 * 64 * 4096 * 2 * 4
    assert traffic.kernels == 3


@given(tokens=st.integers(1, 65536), width=st.integers(64, 65536))
def test_fused_is_never_dearer(tokens: int, width: int) -> None:
    for chain in (norm_traffic, swiglu_traffic):
        one_by_one, fused = (chain(tokens, width, fused=fused) for fused in (False, True))
        assert fused.kernels < one_by_one.kernels
        assert fused.bytes_moved < one_by_one.bytes_moved


@pytest.mark.parametrize(
    ("op", "chain"), [("norm_residual", norm_traffic), ("swiglu", swiglu_traffic)]
)
def test_large_fused_chains_run_at_the_speed_of_their_bytes(
    op: str, chain: Callable[..., Traffic]
) -> None:
    """On an H200, beyond its L2: the counted bytes pass at 80 % of HBM or more."""
    table = read_table(TABLES / "h200_sxm/elementwise.csv")
    tokens, width = (table[name].astype(np.float64) for name in ("num_tokens", "width"))
    chosen = (table["op"] == op) & (table["form"] == "fused") & (tokens * width >= 2**25)
    moved = chain(tokens[chosen], width[chosen], fused=True).bytes_moved
    assert chosen.sum() >= 4
    rate = moved / latency_s(table)[chosen]
    assert np.all(rate > 0.8 * 4.8e12)
    assert np.all(rate < 4.8e12)


H100 = load_gpu("h100")
CONSTANTS = load_calibration(H100).step
"""Of TensorRT-LLM: fitted on its serving runs, not on the tables below."""


def modelled_s(saved: Traffic) -> np.ndarray:
    bytes_per_s = CONSTANTS.elementwise_efficiency * H100.hbm_bytes_per_s
    return saved.seconds(launch_s=CONSTANTS.elementwise_launch_s, bytes_per_s=bytes_per_s)


@pytest.mark.parametrize(
    ("op", "chain", "low", "high"),
    [("norm_residual", norm_traffic, 0.9, 1.1), ("swiglu", swiglu_traffic, 1.0, 1.75)],
)
def test_what_fusing_a_chain_saves_was_measured(
    op: str, chain: Callable[..., Traffic], low: float, high: float
) -> None:
    """On an H100, from 1,024 tokens on: the formula over the difference of both forms' times."""
    table = read_table(TABLES / "h100_sxm/elementwise.csv")
    columns = ("num_tokens", "width")
    times = {}
    for form in ("unfused", "fused"):
        rows = (table["op"] == op) & (table["form"] == form)
        tokens, width = (table[name][rows].astype(np.float64) for name in columns)
        order = np.lexsort((width, tokens))
        times[form] = latency_s(table)[rows][order]
    large = tokens[order] >= 1024
    tokens, width = tokens[order][large], width[order][large]
    before, after = (chain(tokens, width, fused=fused) for fused in (False, True))
    saved = Traffic(
        kernels=before.kernels - after.kernels, bytes_moved=before.bytes_moved - after.bytes_moved
    )
    ratio = modelled_s(saved) / (times["unfused"] - times["fused"])[large]
    assert len(ratio) == 12
    assert np.all((ratio > low) & (ratio < high))


def test_what_a_prompts_scores_cost_was_measured() -> None:
    """On an H100: the formula over operators one by one less torch's fastest kernel (cuDNN)."""
    table = read_table(TABLES / "h100_sxm/fused_attention.csv")
    queries = table["query_len"].astype(np.float64)
    for batch, length in ((1, 512), (1, 2048), (8, 1024), (1, 4096)):
        load = (queries == length) & (table["batch_size"].astype(np.float64) == batch)
        one_by_one, fused = (
            latency_s(table)[load & (table["form"] == form)].item() for form in ("unfused", "cudnn")
        )
        said_s = float(modelled_s(unfused_score_traffic(32 * batch, length, length)))
        assert 0.65 < said_s / (one_by_one - fused) < 0.95
