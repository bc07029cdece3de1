"""Drift: what lies far outside its interval, and versions that were never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.validation.drift import Watched, drift_lines, drifts, new_versions
from planner.validation.validate import validate

RUNS = Path(__file__).parents[3] / "profiles" / "runs" / "h200_vllm" / "runs.jsonl"

PREDICTED = {"tpot_ms.mean": (10.0, (9.0, 11.0)), "itl_ms.p99": (20.0, (19.0, 21.0))}


def _seen(engine: str) -> list[str]:
    return ["0.25.1"] if engine == "vllm" else []


def watched(tpot_ms: float, version: str, engine: str = "vllm") -> Watched:
    found = drifts("run-1", {"tpot_ms.mean": tpot_ms}, PREDICTED)
    return Watched(engine=engine, engine_version=version, drifts=tuple(found))


@pytest.mark.parametrize(
    ("tpot_ms", "is_far"), [(10.0, False), (11.1, False), (12.0, True), (8.9, False), (8.0, True)]
)
def test_one_in_ten_may_lie_outside_but_not_far(tpot_ms: float, is_far: bool) -> None:
    found = drifts("r", {"tpot_ms.mean": tpot_ms}, PREDICTED)
    assert bool(found) is is_far


def test_metrics_that_hang_on_chance_are_not_watched() -> None:
    assert drifts("r", {"itl_ms.p99": 90.0, "ttft_ms.mean": 3.0}, PREDICTED) == []


def test_a_version_is_new_only_to_who_knows_versions() -> None:
    assert new_versions(["0.25.1", "0.26.0", ""], ["0.25.1"]) == ["0.26.0"]
    assert new_versions(["0.26.0"], []) == []


def test_drift_is_said_with_the_way_out() -> None:
    lines = drift_lines([watched(13.0, "0.26.0")], _seen, source="--store runs.db")
    assert lines == [
        "drift: run-1: tpot_ms.mean 13, predicted 10 (9 to 11)",
        "drift: vllm 0.26.0 was never seen by the calibration in force",
        "recalibrate: planner calibrate --store runs.db --engine vllm --install",
    ]
    assert drift_lines([], _seen, source="--store runs.db") == []


def test_one_far_run_among_many_is_chance() -> None:
    many = [watched(10.0, "0.25.1")] * 9
    assert drift_lines([*many, watched(13.0, "0.25.1")], _seen, source="--store runs.db") == []
    few = drift_lines([*many[:3], watched(13.0, "0.25.1")], _seen, source="--store runs.db")
    assert len(few) == 2


def test_each_engine_is_recalibrated_by_a_command_of_its_own() -> None:
    runs = [watched(13.0, "0.25.1"), watched(13.0, "1.2", engine="trtllm")]
    commands = [line for line in drift_lines(runs, _seen, source="--runs f") if "recal" in line]
    assert [command.split("--engine ")[1] for command in commands] == [
        "vllm --install",
        "trtllm --install",
    ]


def test_a_slower_engine_of_another_version_is_noticed(tmp_path: Path) -> None:
    run = json.loads(RUNS.read_text().splitlines()[0])
    run["workload"].pop("requests_file", None)
    run["workload"] |= {"protocol": "closed_loop", "concurrency": 8, "isl": 1024, "osl": 256}
    run["measured"]["tpot_ms"]["mean"] *= 5
    run["engine_version"] = "9.0"
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(run) + "\n")
    lines = validate(file).drift_lines(f"--runs {file}")
    assert any("tpot_ms.mean" in line for line in lines)
    assert "drift: vllm 9.0 was never seen by the calibration in force" in lines
    assert lines[-1] == f"recalibrate: planner calibrate --runs {file} --engine vllm --install"


def test_runs_that_the_calibration_rests_on_have_not_drifted() -> None:
    lines = validate(RUNS).drift_lines(f"--runs {RUNS}")
    assert lines == []
