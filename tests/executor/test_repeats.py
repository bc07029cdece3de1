"""Repeats: the interval of a median covers it, outliers are named, nothing stops too early."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.repeats import RepeatRule, interval_of_median, outliers, repeats_section


def measured(rate: float, ttft_ms: float = 10.0) -> dict[str, Any]:
    return {"output_tok_per_s": rate, "ttft_ms": {"p50": ttft_ms}, "tpot_ms": {"p50": None}}


def test_interval_of_ten_values_is_the_textbooks() -> None:
    # David and Nagaraja, Order Statistics, table of confidence intervals for the median: for
    # n = 10, the second and the ninth value cover it with probability 0.9785.
    interval = interval_of_median([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0, 10.0])
    assert (interval.low, interval.high, interval.median) == (2.0, 9.0, 5.5)
    assert interval.coverage == pytest.approx(0.9785, abs=1e-4)


def test_three_values_cannot_reach_the_confidence() -> None:
    assert interval_of_median([1.0, 2.0, 3.0]).coverage == pytest.approx(0.75)


@given(st.integers(5, 25), st.integers(0, 2**32))
def test_the_interval_covers_the_median_as_often_as_it_says(n: int, seed: int) -> None:
    samples = np.random.default_rng(seed).exponential(1.0, (400, n))
    intervals = [interval_of_median(row.tolist()) for row in samples]
    covered = np.mean([i.low <= np.log(2) <= i.high for i in intervals])
    # Five standard deviations of a share of 400.
    assert covered >= intervals[0].coverage - 5 * np.sqrt(0.1 * 0.9 / 400)
    assert intervals[0].coverage >= 0.9


def test_repeats_stop_when_they_agree_or_there_are_enough() -> None:
    rule = RepeatRule(least=3, most=5, tolerance=0.05)
    assert not rule.is_enough([measured(100.0)] * 2)
    assert rule.is_enough([measured(100.0), measured(101.0), measured(99.0)])
    apart = [measured(100.0), measured(120.0), measured(80.0)]
    assert not rule.is_enough(apart)
    assert not rule.is_enough([measured(100.0, t) for t in (10.0, 10.1, 14.0)])
    assert rule.is_enough(apart + apart[:2])


def test_outliers_are_named() -> None:
    assert outliers([100.0, 101.0, 99.0, 100.5, 60.0]) == [4]
    assert outliers([100.0, 101.0, 99.0]) == []
    assert outliers([100.0] * 4) == []


def test_a_section_holds_what_a_report_shows() -> None:
    section = repeats_section([measured(100.0), measured(102.0), measured(98.0)])
    assert section["num_repeats"] == 3
    assert section["output_tok_per_s"]["median"] == 100.0
    assert section["output_tok_per_s"]["interval"] == [98.0, 102.0]
    assert "tpot_ms.p50" not in section
    assert repeats_section([]) == {"num_repeats": 0}
