"""Beliefs: what measuring one candidate says of all, and what measuring is worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.tuning.belief import NOISE_LOG_SD, Belief

EVERY = np.ones(4, dtype=bool)


def belief(*log_scores: float, sd: float = 0.1, apart: float = 1.0) -> Belief:
    count = len(log_scores)
    distances = apart * (1 - np.eye(count))
    return Belief.prior(np.array(log_scores), np.full(count, sd), distances)


def test_a_measurement_is_believed_and_moves_what_is_alike() -> None:
    before = belief(1.0, 1.0, 1.0)
    after = before.after({0: [0.8]})
    assert after.mean[0] == pytest.approx(0.8, abs=0.01)
    assert 0.8 < after.mean[1] < 1.0
    near = belief(1.0, 1.0, 1.0, apart=0.1).after({0: [0.8]})
    assert near.mean[1] < after.mean[1]
    assert after.covariance[0, 0] == pytest.approx(NOISE_LOG_SD**2, rel=0.05)


def test_several_runs_of_one_candidate_are_their_mean() -> None:
    after = belief(1.0, 1.0, sd=5.0).after({0: [0.7, 0.9]})
    assert after.mean[0] == pytest.approx(0.8, abs=1e-3)
    assert after.covariance[0, 0] == pytest.approx(NOISE_LOG_SD**2 / 2, rel=0.01)


def test_what_surely_loses_is_not_worth_measuring() -> None:
    gains = belief(1.0, 0.98, -3.0, 0.9).gains(EVERY)
    assert gains[2] < 1e-6
    assert gains[1] > gains[3] > gains[2]


def test_what_is_known_need_not_be_measured() -> None:
    distances = 1 - np.eye(2)
    known = Belief.prior(np.array([1.0, 1.0]), np.array([1e-6, 0.2]), distances)
    gains = known.gains(np.ones(2, dtype=bool))
    assert gains[1] > 0.05
    # Half of the doubt is shared: what is measured of one says a part of the other.
    assert gains[0] < 1e-3 * gains[1]


def test_what_may_not_be_chosen_is_worth_nothing() -> None:
    gains = belief(1.0, 1.0, 1.0, 1.0).gains(np.array([True, True, False, False]))
    assert (gains[2:] == 0).all()
    assert (gains[:2] > 0).all()
    assert (belief(1.0, 1.0).gains(np.zeros(2, dtype=bool)) == 0).all()


def test_a_pending_measurement_takes_away_doubt_but_no_hope() -> None:
    before = belief(1.0, 1.0, 0.9, 0.9)
    after = before.without_news([0])
    np.testing.assert_allclose(after.mean, before.mean)
    assert after.covariance[0, 0] < 0.05 * before.covariance[0, 0]


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=6),
    st.floats(0.01, 0.5),
    st.dictionaries(st.integers(0, 1), st.lists(st.floats(-1, 1), min_size=1, max_size=3)),
)
def test_knowing_more_never_adds_doubt_and_gains_are_never_losses(
    log_scores: list[float], sd: float, measured: dict[int, list[float]]
) -> None:
    before = belief(*log_scores, sd=sd)
    after = before.after(measured)
    assert (np.diag(after.covariance) <= np.diag(before.covariance) + 1e-12).all()
    assert np.linalg.eigvalsh(after.covariance).min() > -1e-9
    assert (after.gains(np.ones(len(log_scores), dtype=bool)) >= -1e-9).all()
