"""The definitions of the serving metrics."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.metrics import (
    Distribution,
    LatencyLimits,
    RequestTimes,
    goodput_per_s,
    percentile,
    serving_metrics,
)


def times(*rows: tuple[float, float, float, int]) -> RequestTimes:
    """Rows of arrival, TTFT, E2EL and OSL, with even gaps."""
    arrival_s, ttft_s, e2el_s, osl = (np.array(column) for column in zip(*rows, strict=True))
    gaps = [np.full(n - 1, (e - t) / max(n - 1, 1)) for _, t, e, n in rows]
    return RequestTimes(
        arrival_s=arrival_s, ttft_s=ttft_s, e2el_s=e2el_s, osl=osl, itl_s=np.concatenate(gaps)
    )


SERVED = times((10.0, 0.1, 0.5, 5), (11.0, 0.3, 1.3, 11), (12.0, 0.2, 0.2, 1))


def test_metrics_by_hand() -> None:
    metrics = serving_metrics(SERVED)
    assert SERVED.tpot_s == pytest.approx([0.1, 0.1])
    assert metrics.ttft_s.mean == pytest.approx(0.2)
    assert metrics.ttft_s.p50 == pytest.approx(0.2)
    assert metrics.e2el_s.p90 == pytest.approx(0.5 + 0.8 * 0.8)
    assert metrics.duration_s == pytest.approx(2.3)
    assert metrics.request_per_s == pytest.approx(3 / 2.3)
    assert metrics.output_tok_per_s == pytest.approx(17 / 2.3)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (LatencyLimits(), 3),
        (LatencyLimits(ttft_s=0.2), 2),
        (LatencyLimits(tpot_s=0.05), 1),
        (LatencyLimits(e2el_s=0.5, ttft_s=0.15), 1),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: LatencyLimits, good: int) -> None:
    assert goodput_per_s(SERVED, limits) == pytest.approx(good / 2.3)


def test_percentiles_are_linear_between_neighbours() -> None:
    """The default of `numpy.percentile`: type 7 of Hyndman and Fan (1996)."""
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.9) == pytest.approx(3.7)
    assert Distribution.of([1.0, 2.0]).p99 == pytest.approx(1.99)


def test_nothing_served_has_no_latency_and_no_rate() -> None:
    nothing = RequestTimes(
        arrival_s=np.array([]),
        ttft_s=np.array([]),
        e2el_s=np.array([]),
        osl=np.array([], dtype=np.int64),
        itl_s=np.array([]),
    )
    metrics = serving_metrics(nothing)
    assert math.isnan(metrics.ttft_s.mean)
    assert math.isnan(percentile([], 0.5))
    assert (metrics.output_tok_per_s, goodput_per_s(nothing, LatencyLimits())) == (0.0, 0.0)


SECONDS = st.floats(0.001, 100.0)
ROWS = st.lists(st.tuples(SECONDS, SECONDS, SECONDS, st.integers(1, 50)), min_size=1, max_size=20)


@given(rows=ROWS, factor=st.floats(0.1, 10.0))
def test_a_slower_clock_stretches_times_and_lowers_rates(
    rows: list[tuple[float, float, float, int]], factor: float
) -> None:
    rows = [(arrival, first, first + rest, osl) for arrival, first, rest, osl in rows]
    stretched = [(a * factor, t * factor, e * factor, n) for a, t, e, n in rows]
    before, after = serving_metrics(times(*rows)), serving_metrics(times(*stretched))
    assert after.ttft_s.p90 == pytest.approx(before.ttft_s.p90 * factor)
    assert after.e2el_s.mean == pytest.approx(before.e2el_s.mean * factor)
    assert after.output_tok_per_s == pytest.approx(before.output_tok_per_s / factor)


def test_measured_runs_are_reproduced_from_their_requests(shared: Path) -> None:
    """Requests are rounded to 0.01 ms, and E2EL is the sum of a request's gaps."""
    folder = shared / "runs" / "h200_vllm"
    tolerance_ms = {"ttft_s": 0.006, "tpot_s": 0.001, "itl_s": 0.006, "e2el_s": 0.1}
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 6
    for run in runs:
        metrics = serving_metrics(read_times(folder / run["workload"]["requests_file"]))
        measured = run["measured"]
        for name, tolerance in tolerance_ms.items():
            distribution = getattr(metrics, name)
            for statistic, value in measured[name.replace("_s", "_ms")].items():
                assert getattr(distribution, statistic) * 1e3 == pytest.approx(
                    value, abs=tolerance
                ), (run["run_id"], name, statistic)
        assert metrics.duration_s == pytest.approx(measured["duration_s"], rel=1e-3)
        assert metrics.output_tok_per_s == pytest.approx(measured["output_tok_per_s"], rel=1e-3)
        assert metrics.request_per_s == pytest.approx(measured["request_per_s"], rel=1e-3)


def read_times(path: Path) -> RequestTimes:
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return RequestTimes(
        arrival_s=np.array([row["arrival_s"] for row in rows]),
        ttft_s=np.array([row["ttft_ms"] for row in rows]) / 1e3,
        e2el_s=np.array([row["e2el_ms"] for row in rows]) / 1e3,
        osl=np.array([row["osl"] for row in rows]),
        itl_s=np.concatenate([row["itl_ms"] for row in rows]) / 1e3,
    )
