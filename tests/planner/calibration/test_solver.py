"""Misses that share an error are weighed as the Gaussian likelihood weighs them."""

from __future__ import annotations

import numpy as np
import pytest

from planner.calibration.solver import shared_apart


def test_the_squares_are_those_of_the_full_covariance() -> None:
    rng = np.random.default_rng(0)
    misses, shared = rng.normal(size=12), rng.normal(size=(12, 2))
    covariance = np.eye(12) + shared @ shared.T
    expected = misses @ np.linalg.solve(covariance, misses)
    assert np.square(shared_apart(misses, shared)).sum() == pytest.approx(expected)


def test_what_nothing_shares_stays_as_it_is() -> None:
    misses = np.array([1.0, -2.0, 0.5])
    np.testing.assert_array_equal(shared_apart(misses, np.zeros((3, 1))), [*misses, 0.0])


@pytest.mark.parametrize("count", [10, 10_000])
def test_however_many_misses_there_are_a_common_one_is_one_observation(count: int) -> None:
    """Each is 3 noises off, where 1.5 in common were expected: a miss of two deviations."""
    apart = shared_apart(np.full(count, 3.0), np.full((count, 1), 1.5))
    assert np.linalg.norm(apart) == pytest.approx(2.0, rel=0.03)
    assert np.abs(apart[:count]).max() < 1e-9
