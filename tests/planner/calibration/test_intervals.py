"""Intervals keep what they promise: on ranks, on small samples, and never judge themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planner.calibration.fit import Fit
from planner.calibration.intervals import (
    find_interval,
    left_out_coverage,
    quantiles,
    residual_intervals,
)


@dataclass
class StandInRow:
    """As much of a predicted run as intervals read."""

    error: float
    protocol: str = "closed_loop"
    front_end_share: float = 0.0
    predicted: dict[str, float] = field(default_factory=lambda: {"tpot_ms.mean": 10.0})

    @property
    def run(self) -> Any:
        measured = {"tpot_ms.mean": 10.0 * math.exp(self.error)}
        return SimpleNamespace(measured=measured, protocol=self.protocol)

    @property
    def regime(self) -> str:
        return self.protocol

    def scored(self) -> list[str]:
        return ["tpot_ms.mean"]


def rows(errors: Any, **changes: Any) -> list[Any]:
    return [StandInRow(error=float(error), **changes) for error in errors]


def test_from_19_residuals_on_the_ends_are_ranks() -> None:
    errors = np.linspace(-1, 1, 99)
    found = quantiles(errors.tolist())
    # k = floor(0.05 * 100) = 5: the fifth from either end.
    assert found.log_q05 == pytest.approx(errors[4], abs=1e-4)
    assert found.log_q95 == pytest.approx(errors[-5], abs=1e-4)
    assert quantiles(list(range(19))).log_q95 == 18


def test_few_residuals_take_the_normal_prediction_interval() -> None:
    found = quantiles([-0.1, 0.0, 0.1])
    # Mean 0, sd 0.1, t(0.95; 2) = 2.919986, sqrt(1 + 1/3) = 1.154701.
    assert found.log_q95 == pytest.approx(2.919986 * 0.1 * 1.154701, abs=1e-4)
    assert found.log_q05 == -found.log_q95


@pytest.mark.parametrize("count", [4, 12, 30, 100])
def test_the_next_residual_is_inside_in_nine_of_ten_cases(count: int) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        errors = rng.normal(0.02, 0.05, count + 1)
        found = quantiles(errors[:-1].tolist())
        held += found.log_q05 <= errors[-1] <= found.log_q95
    assert 0.88 < held / 2000 < 0.955


def test_a_kind_of_load_has_an_interval_of_its_own_where_runs_suffice() -> None:
    found = residual_intervals(
        [*rows([0.01] * 10), *rows([0.2] * 8, protocol="open_loop"), *rows([0.5] * 3)]
    )
    assert found["open_loop/tpot_ms.mean"].log_q95 == pytest.approx(0.2)
    assert found["tpot_ms.mean"].log_q95 > 0.3
    few = residual_intervals([*rows([0.0] * 10), *rows([0.2] * 7, protocol="open_loop")])
    assert "open_loop/tpot_ms.mean" not in few


def test_what_the_front_end_hides_says_nothing() -> None:
    hidden = rows([0.9] * 10, front_end_share=0.95)
    assert residual_intervals([*rows([0.0] * 10), *hidden])["tpot_ms.mean"].log_q95 == 0.0


def test_no_fold_judges_itself() -> None:
    """One model that errs by 50 % is outside the others' interval, however many its runs."""
    good, bad = rows(np.linspace(-0.02, 0.02, 20)), rows([0.5] * 20)
    coverage = left_out_coverage([*good, *bad], ["good"] * 20 + ["bad"] * 20)
    count, share = coverage["tpot_ms.mean"]
    # The bad one's interval reaches from 0 to 0.5: it holds half of the good.
    assert count == 40
    assert share == pytest.approx(0.25)


def test_groups_that_err_alike_widen_the_interval_for_the_next_one() -> None:
    """Within a group errors differ by 1 %, between groups by 10 %: the next group is held."""
    rng = np.random.default_rng(3)
    held = []
    for _ in range(100):
        biases = rng.normal(0, 0.1, 7)
        errors = (biases[:, None] + rng.normal(0, 0.01, (7, 6))).ravel()
        folds = [str(row // 6) for row in range(42)]
        _, share = left_out_coverage(rows(errors), folds)["tpot_ms.mean"]
        held.append(share)
    assert 0.8 < np.mean(held) <= 0.97


def test_open_loops_near_capacity_have_an_interval_of_their_own() -> None:
    near = rows([-0.4, 0.4] * 5, protocol="open_loop_near_capacity")
    found = residual_intervals([*rows([-0.01, 0.01] * 5, protocol="open_loop"), *near])
    assert found["open_loop_near_capacity/tpot_ms.mean"].log_q95 > 0.4
    assert (
        find_interval(found, "tpot_ms.mean", "open_loop_near_capacity")
        == (found["open_loop_near_capacity/tpot_ms.mean"])
    )


def test_errors_grow_where_constants_hang_on_who_is_left_out() -> None:
    fit = Fit(
        values={"a": 2.0, "b": 5.0}, relative_errors={"a": 0.01, "b": 0.2}, not_told=()
    )  # fmt: skip
    without = [{"a": 2.0 * math.exp(shift), "b": 5.0} for shift in (-0.1, 0.0, 0.1)]
    errors = fit.with_jackknife(without).relative_errors
    # sqrt((g - 1) / g * sum of squares) = sqrt(2 / 3 * 0.02).
    assert errors["a"] == pytest.approx(math.sqrt(2 / 3 * 0.02))
    assert errors["b"] == 0.2
    assert fit.with_jackknife(without[:2]) == fit
