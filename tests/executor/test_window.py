"""The steady window leaves out ramp and tail; only silences of a busy engine are stalls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.records import MeasuredRequest, RequestStatus
from executor.window import longest_stall_s, steady_section, steady_window


def request(arrival_s: float, chunk_s: list[float]) -> MeasuredRequest:
    return MeasuredRequest(
        arrival_s=arrival_s,
        isl=4,
        osl=len(chunk_s),
        chunk_s=tuple(chunk_s),
        chunk_tokens=(1,) * len(chunk_s),
    )


def evenly(count: int, gap_s: float = 0.1) -> list[float]:
    return [gap_s * (n + 1) for n in range(count)]


def test_a_closed_loop_without_its_tail() -> None:
    # Two clients; the last request of one is three times as long.
    requests = [request(t, evenly(10)) for t in (0.0, 0.0, 1.0, 1.0, 2.0)]
    requests.append(request(2.0, evenly(30)))
    window = steady_window(requests)
    assert window is not None
    assert (window.start_s, window.end_s) == pytest.approx((0.0, 3.0))
    section = steady_section(requests)
    # Both clients get a token every 0.1 s.
    assert section["output_tok_per_s"] == pytest.approx(20.0)
    assert section["num_requests"] == 6
    assert section["tpot_ms_mean"] == pytest.approx(100.0)


def test_a_ramp_is_left_out() -> None:
    requests = [request(0.5 * n, evenly(100)) for n in range(4)]
    window = steady_window(requests)
    assert window is not None
    assert (window.start_s, window.end_s) == pytest.approx((1.5, 10.0))


def test_nothing_served_has_no_window() -> None:
    lost = MeasuredRequest(arrival_s=0.0, isl=4, osl=0, status=RequestStatus.LOST)
    assert steady_window([lost]) is None
    assert steady_section([lost]) == {}
    assert longest_stall_s([lost]) == 0.0


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 20)), min_size=1, max_size=20))
def test_the_window_lies_inside_the_run(rows: list[tuple[float, int]]) -> None:
    requests = [request(arrival_s, evenly(count)) for arrival_s, count in rows]
    window = steady_window(requests)
    assert window is not None
    assert window.length_s >= 0
    assert window.start_s >= min(r.arrival_s for r in requests)
    assert window.end_s <= max(r.arrival_s + r.e2el_s for r in requests) + 1e-9


def test_a_pause_of_all_requests_is_a_stall() -> None:
    chunks = [*evenly(20, 0.02), *[3.4 + 0.02 * n for n in range(20)]]
    assert longest_stall_s([request(0.0, chunks), request(0.0, chunks)]) == pytest.approx(3.0)


def test_waiting_for_the_next_arrival_is_none() -> None:
    requests = [request(0.0, evenly(20, 0.02)), request(60.0, evenly(20, 0.02))]
    assert longest_stall_s(requests) == 0.0


def test_a_slow_engine_is_not_a_stalled_one() -> None:
    assert longest_stall_s([request(0.0, evenly(20, 2.0))]) == 0.0
