"""Reports of trtllm-bench in their documented formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.errors import ProfileError
from executor.backends.trtllm_reports import (
    iteration_summary,
    read_iteration_log,
    read_report,
    read_request_report,
    report_version,
)
from executor.records import RequestStatus


def written(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_the_documented_report(shared: Path) -> None:
    path = shared / "trtllm/samples/report_SYNTHETIC_layout.json"
    measured = read_report(path)
    assert measured["ttft_ms"] == {
        "mean": 67.25, "p50": 73.0, "p90": 87.0, "p95": 87.0, "p99": 87.0,
    }  # fmt: skip
    assert measured["tpot_ms"]["mean"] == pytest.approx(10.103159)
    assert measured["output_tok_per_s"] == pytest.approx(313.72549)
    assert measured["duration_s"] == 1.275
    assert report_version(path) == "1.2.1"


def test_a_report_without_streaming_has_no_ttft(tmp_path: Path) -> None:
    performance = {
        "total_latency_ms": 1000.0,
        "request_throughput_req_s": 2.0,
        "system_output_throughput_tok_s": 50.0,
        "request_latency_percentiles_ms": {"average": 5.0, "p50": 4.0, "p99": 9.0},
    }
    report = {"performance": performance, "decoding_stats": None}
    measured = read_report(written(tmp_path / "r.json", report))
    assert measured["e2el_ms"] == {"mean": 5.0, "p50": 4.0, "p99": 9.0}
    assert "ttft_ms" not in measured


@pytest.mark.parametrize("data", ["", "[]", "{}", '{"performance": {}}', "not json"])
def test_what_is_no_report_is_refused(tmp_path: Path, data: str) -> None:
    with pytest.raises(ProfileError):
        read_report(written(tmp_path / "r.json", data))
    with pytest.raises(ProfileError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


def row(**changes: Any) -> dict[str, Any]:
    return {
        "num_input_tokens": 10, "num_total_output_tokens": 5, "error_tokens": 0,
        "start_timestamp": 4_000_000_000, "first_token_timestamp": 4_100_000_000,
        "end_timestamp": 4_500_000_000, **changes,
    }  # fmt: skip


def test_requests_are_in_order_of_arrival(tmp_path: Path) -> None:
    rows = [
        row(start_timestamp=4_050_000_000),
        row(num_total_output_tokens=1, end_timestamp=4_100_000_000),
        row(start_timestamp=4_060_000_000, error_tokens=2),
    ]
    requests = read_request_report(written(tmp_path / "r.json", rows))
    assert [r.arrival_s for r in requests] == pytest.approx([0.0, 0.05, 0.06])
    assert requests[0].chunk_s == pytest.approx((0.1,))
    assert requests[1].ttft_s == pytest.approx(0.05)
    assert requests[1].e2el_s == pytest.approx(0.45)
    assert requests[1].chunk_tokens == (1, 4)
    assert requests[2].status is RequestStatus.REFUSED


def test_an_iteration_log_is_pythons_notation(tmp_path: Path) -> None:
    lines = (
        "{'iter': 1, 'iterLatencyMS': 8.0, 'inflightBatchingStats': {'numPausedRequests': 1}}\n\n"
        "{'iter': 2, 'iterLatencyMS': 12.0, 'inflightBatchingStats': None, 'ok': True}\n"
    )
    iterations = read_iteration_log(written(tmp_path / "i.log", lines))
    assert iterations[1]["ok"] is True
    assert iteration_summary(iterations) == {
        "num_iterations": 2.0, "iteration_ms_mean": 10.0, "num_preemptions": 1.0,
    }  # fmt: skip
    with pytest.raises(ProfileError, match="line 1 is no iteration"):
        read_iteration_log(written(tmp_path / "i.log", "__import__('os')\n"))
