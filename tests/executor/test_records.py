"""Run and request files: what is written is what a reader finds, also after a failure."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from executor.backend import Failure
from executor.records import (
    MeasuredRequest,
    RequestStatus,
    RunRecord,
    append_requests,
    append_run,
    measured_section,
    write_requests,
)
from planner.workloads.measured import read_requests, read_runs

REQUESTS = (
    MeasuredRequest(arrival_s=0.0, isl=10, osl=4, chunk_s=(0.1, 0.2, 0.4), chunk_tokens=(1, 1, 2)),
    MeasuredRequest(arrival_s=0.5, isl=20, osl=1, chunk_s=(0.5,), chunk_tokens=(1,)),
    MeasuredRequest(
        arrival_s=0.6, isl=30, osl=0, status=RequestStatus.LOST, error="closed by the server"
    ),
)


def run_record(**changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "run_id": "r1",
        "source": "test",
        "gpu": "h200_sxm",
        "engine": "vllm",
        "model": "Qwen/Qwen3-8B",
        "config": {"max_batch_size": 8},
        "workload": {"protocol": "closed_loop", "concurrency": 2, "isl": 10, "osl": 4},
        "measured": measured_section(REQUESTS),
    }
    return RunRecord(**{**fields, **changes})


def test_measured_section_counts_only_what_ended_well() -> None:
    measured = measured_section(REQUESTS)
    assert measured["ttft_ms"]["mean"] == 300.0
    assert measured["tpot_ms"]["mean"] == 100.0
    assert measured["itl_ms"]["p50"] == 150.0
    assert measured["duration_s"] == 1.0
    assert measured["output_tok_per_s"] == 5.0
    assert measured["num_failed_requests"] == 1


def test_a_run_of_failures_has_no_latencies() -> None:
    measured = measured_section(REQUESTS[2:])
    assert measured["ttft_ms"]["p99"] is None
    assert (measured["output_tok_per_s"], measured["num_failed_requests"]) == (0.0, 1)


def test_the_planner_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, run_record())
    append_run(path, run_record(run_id="r2", client={"limited": True}))
    runs = [run for run, _, _ in read_runs(path) if run is not None]
    assert [run.run_id for run in runs] == ["r1", "r2"]
    assert runs[0].measured["tpot_ms.mean"] == 100.0
    assert "client" not in json.loads(path.read_text().splitlines()[0])


def test_a_requests_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.requests.jsonl.gz"
    write_requests(path, REQUESTS[:2])
    isl, osl, arrival_s = read_requests(path)
    assert (isl.tolist(), osl.tolist(), arrival_s.tolist()) == ([10, 20], [4, 1], [0.0, 0.5])
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert lines[0]["itl_ms"] == [100.0, 200.0]
    assert lines[0]["chunk_tokens"] == [1, 1, 2]
    assert "chunk_tokens" not in lines[1]
    assert list(tmp_path.iterdir()) == [path]


def test_runs_share_a_requests_file_by_id(tmp_path: Path) -> None:
    path = tmp_path / "all.gz"
    append_requests(path, REQUESTS[:1], run_id="a")
    append_requests(path, REQUESTS[1:], run_id="b")
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [line["run_id"] for line in lines] == ["a", "b", "b"]
    assert lines[2] | {"status": "lost", "ttft_ms": None, "itl_ms": []} == lines[2]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, run_record())
    before = path.read_bytes()
    write = os.write
    written: list[int] = []

    def write_ten_bytes_then_fail(descriptor: int, data: bytes) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(write(descriptor, data[:10]))
        return written[0]

    monkeypatch.setattr(os, "write", write_ten_bytes_then_fail)
    with pytest.raises(OSError, match="No space left"):
        append_run(path, run_record(run_id="r2"))
    assert written == [10]
    assert path.read_bytes() == before


def test_a_failed_requests_file_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.gz"
    write_requests(path, REQUESTS[:1])
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_requests(path, REQUESTS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_format_is_documented_in_full() -> None:
    text = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    words = [field.name for field in fields(RunRecord)] + [str(kind) for kind in Failure]
    assert [word for word in words if f"`{word}`" not in text] == []
