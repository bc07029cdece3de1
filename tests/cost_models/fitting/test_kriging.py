"""Kriging over (n, k): exact limits and the closed form of leave-one-out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.fitting.kriging import krige, left_out_error

PAIRS = np.array([(n, k) for n in (256, 512, 1024, 4096) for k in (128, 1024, 3072)], dtype=float)


@given(st.floats(-1.0, 1.0))
def test_a_constant_residual_stays_constant(value: float) -> None:
    residual = np.full((1, len(PAIRS)), value)
    assert krige(PAIRS, residual, np.array([[700.0, 900.0]])) == pytest.approx(value, rel=0.1)


def test_left_out_error_is_what_leaving_out_gives() -> None:
    residual = np.sin(np.arange(3 * len(PAIRS), dtype=float)).reshape(3, -1)
    expected = np.empty_like(residual)
    for out in range(len(PAIRS)):
        others = np.arange(len(PAIRS)) != out
        predicted = krige(PAIRS[others], residual[:, others], PAIRS[[out]])[:, 0]
        expected[:, out] = residual[:, out] - predicted
    assert left_out_error(PAIRS, residual) == pytest.approx(expected)


def test_a_part_shared_by_all_pairs_of_one_n_reaches_an_unmeasured_k() -> None:
    residual = np.where(PAIRS[:, 0] == 512, 0.2, 0.0)[None, :]
    same, other = krige(PAIRS, residual, np.array([[512.0, 8192.0], [16384.0, 8192.0]]))[0]
    assert same > 0.08
    assert abs(other) < 0.05
