"""What fusing saves: bytes counted by hand, laws, and the table that was measured on an H200."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.fusion import Traffic, norm_traffic, swiglu_traffic, unfused_score_traffic
from cost_models.tables import latency_s, read_table

MEASURED = Path(__file__).parents[2] / "profiles/microbench/h200_sxm/elementwise.csv"


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
    table = read_table(MEASURED)
    tokens, width = (table[name].astype(np.float64) for name in ("num_tokens", "width"))
    chosen = (table["op"] == op) & (table["form"] == "fused") & (tokens * width >= 2**25)
    moved = chain(tokens[chosen], width[chosen], fused=True).bytes_moved
    assert chosen.sum() >= 4
    rate = moved / latency_s(table)[chosen]
    assert np.all(rate > 0.8 * 4.8e12)
    assert np.all(rate < 4.8e12)
