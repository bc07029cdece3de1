"""Tokens a step yields: the published formula, its distribution, and what counters say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.acceptance import Acceptance, DraftCounts, believed
from cost_models.errors import ConfigError

CHANCES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("alpha", "gamma", "speed"),
    [
        (0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71),
        (0.9, 10, 6.86),
    ],
)  # fmt: skip
def test_equal_chances_give_the_published_numbers(alpha: float, gamma: int, speed: float) -> None:
    """Leviathan et al. 2023, table 1: with a draft that costs nothing, speed is tokens a step."""
    found = Acceptance(conditional=(alpha,)).tokens_per_step(gamma)
    assert found == pytest.approx(speed, abs=0.005)
    assert found == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))


@given(chances=CHANCES, rate=st.floats(0.0, 1.0), length=st.integers(0, 8))
def test_the_distribution_has_the_mean_of_the_formula(
    chances: list[float], rate: float, length: int
) -> None:
    acceptance = Acceptance(conditional=tuple(chances), draft_rate=rate)
    probabilities = acceptance.distribution(length)
    assert probabilities.shape == (length + 1,)
    assert probabilities.min() >= 0
    assert probabilities.sum() == pytest.approx(1.0)
    mean = float(probabilities @ np.arange(1, length + 2))
    assert mean == pytest.approx(acceptance.tokens_per_step(length))


def test_long_outputs_take_as_many_steps_as_the_mean_says() -> None:
    acceptance = Acceptance(conditional=(0.8, 0.6, 0.5), draft_rate=0.7)
    tokens = np.full(200, 5000)
    steps = acceptance.steps_for(tokens, 3, np.random.default_rng(0))
    assert steps.mean() == pytest.approx(5000 / acceptance.tokens_per_step(3), rel=0.005)
    assert steps.std() > 0


def test_sure_drafts_leave_nothing_to_chance() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 4, 5, 8])
    assert Acceptance(conditional=(1.0,)).steps_for(lengths, 3, rng).tolist() == [0, 1, 1, 2, 2]
    assert Acceptance(conditional=(0.0,)).steps_for(lengths, 3, rng).tolist() == lengths.tolist()


def test_counters_return_the_rates_that_made_them() -> None:
    """10,000 steps, drafts in 8 of 10 of them, each of two tokens."""
    counts = DraftCounts(
        accepted_at=(6000.0, 3000.0), num_drafts=8000.0, num_draft_tokens=16000.0,
        num_tokens=19000.0,
    )  # fmt: skip
    found = counts.plus(counts).acceptance()
    assert found.conditional == (0.75, 0.5)
    assert (found.draft_rate, found.draft_tokens) == (0.8, 2.0)
    assert found.tokens_per_step(2) == pytest.approx(1.9)


def test_what_the_text_says_goes_before_the_prior() -> None:
    known = {"NGram": Acceptance(conditional=(0.9,))}
    assert believed("NGram", known) is known["NGram"]
    assert believed("MTP", known).is_prior
    with pytest.raises(ConfigError, match="decoding_type=Guess"):
        believed("Guess", known)
