"""How many experts wake, and what the busiest rank gets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.operators.routing import (
    FloatArray,
    RankLoad,
    busiest_rank_load,
    expected_active_experts,
)

ALPHAS = (0.0, 0.8, 1.0, 1.01, 1.2)
LAYERS = ((8, 2), (16, 1), (32, 4), (128, 8), (256, 8), (512, 22))

layers = st.sampled_from(LAYERS)
alphas = st.sampled_from(ALPHAS)
TOKENS = np.array([1, 2, 5, 8, 16, 33, 64, 100, 128, 500, 1000, 4096, 30_000, 1_000_000])


def _load(
    layer: tuple[int, int], num_ranks: int, alpha: float, tokens: FloatArray = TOKENS
) -> RankLoad:
    num_experts, top_k = layer
    return busiest_rank_load(
        tokens, num_experts=num_experts, top_k=top_k, num_ranks=num_ranks, power_law_alpha=alpha
    )


def test_balanced_active_experts_follow_the_closed_form() -> None:
    """DeepSeek-V3, 8 of 256 experts: 256·(1 − (31/32)^32) = 163.3."""
    active = expected_active_experts([1, 32, 10_000], num_experts=256, top_k=8)
    assert active == pytest.approx([8.0, 256 * (1 - (31 / 32) ** 32), 256.0])
    assert active[1] == pytest.approx(163.3, abs=0.05)


@given(layer=layers, alpha=alphas, tokens=st.integers(1, 100_000))
def test_active_experts_stay_between_top_k_and_all(
    layer: tuple[int, int], alpha: float, tokens: int
) -> None:
    num_experts, top_k = layer
    active, more = expected_active_experts(
        [tokens, tokens + 1], num_experts=num_experts, top_k=top_k, power_law_alpha=alpha
    )
    assert top_k * (1 - 1e-9) <= active <= more <= num_experts * (1 + 1e-9)


@given(layer=layers, tokens=st.integers(2, 1000))
def test_popular_experts_leave_others_asleep(layer: tuple[int, int], tokens: int) -> None:
    num_experts, top_k = layer
    balanced, mild, steep = (
        expected_active_experts(tokens, num_experts=num_experts, top_k=top_k, power_law_alpha=alpha)
        for alpha in (0.0, 1.01, 1.2)
    )
    assert max(mild, steep) <= balanced * (1 + 1e-9)


def test_active_experts_agree_with_sampled_routing() -> None:
    """Tokens that draw experts one by one, with the chances of a 1.2 power law."""
    rng = np.random.default_rng(0)
    num_experts, num_tokens = 64, 24
    quantile = (np.arange(num_experts) + 0.5) / num_experts
    low, high = 0.01**-0.2, 2.0**-0.2
    popularity = (low + quantile * (high - low)) ** -5.0
    drawn = rng.choice(num_experts, (4000, num_tokens), p=popularity / popularity.sum())
    active = np.mean([np.unique(row).size for row in drawn])
    expected = expected_active_experts(
        num_tokens, num_experts=num_experts, top_k=1, power_law_alpha=1.2
    )
    assert expected == pytest.approx(active, rel=0.01)


@given(layer=layers, alpha=alphas, num_ranks=st.sampled_from([1, 2, 4, 8]))
def test_more_tokens_never_mean_less_load(
    layer: tuple[int, int], alpha: float, num_ranks: int
) -> None:
    load = _load(layer, num_ranks, alpha)
    assert np.all(np.diff(load.active_experts) >= -1e-9)
    assert np.all(np.diff(load.assignments) >= -1e-9)


@given(layer=layers, alpha=alphas, num_ranks=st.sampled_from([1, 2, 4, 8]))
def test_the_busiest_rank_has_at_least_its_share(
    layer: tuple[int, int], alpha: float, num_ranks: int
) -> None:
    num_experts, top_k = layer
    load = _load(layer, num_ranks, alpha)
    pairs = TOKENS * top_k
    assert np.all(load.assignments >= pairs / num_ranks * (1 - 1e-9))
    assert np.all(load.assignments <= pairs * (1 + 1e-9))
    assert np.all(load.active_experts <= num_experts / num_ranks)


def test_one_rank_has_everything() -> None:
    for alpha in ALPHAS:
        assert _load((128, 8), 1, alpha).assignments == pytest.approx(TOKENS * 8)


def test_balanced_routing_is_even() -> None:
    load = _load((256, 8), 8, 0.0, np.array([1.0, 4.0, 64.0, 4096.0]))
    assert load.active_experts == pytest.approx([1, 4, 32, 32])
    assert load.assignments == pytest.approx([1, 4, 64, 4096])


def test_a_power_law_makes_one_rank_hot() -> None:
    balanced, mild, steep = (_load((256, 8), 8, alpha).assignments[-2] for alpha in (0, 1.01, 1.2))
    assert 1.3 < mild / balanced < 1.8
    assert steep > mild


def test_agrees_with_random_draws() -> None:
    """Mean over many draws from NumPy's generator, of the rule in the module's docstring."""
    num_experts, top_k, num_ranks, tokens, alpha = 128, 8, 4, 1024, 1.2
    rng = np.random.default_rng(1)
    low, high = 1.0, (0.8 * tokens) ** (1 - alpha)
    popularity = (low + rng.random((2000, num_experts)) * (high - low)) ** (1 / (1 - alpha))
    counts = popularity / popularity.sum(1, keepdims=True) * tokens * top_k
    ranks = np.minimum(counts, tokens).reshape(2000, num_ranks, -1).sum(2)
    spare = tokens * top_k - ranks.sum(1)
    hottest = (ranks.max(1) + spare / num_ranks).mean()
    load = _load((num_experts, top_k), num_ranks, alpha, np.array([float(tokens)]))
    assert load.assignments[0] == pytest.approx(hottest, rel=0.04)
