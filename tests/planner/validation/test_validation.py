"""Predictions know nothing of what was measured, and are as good as the README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.validation.validate import validate

RUN = {
    "schema_version": 1,
    "run_id": "a",
    "gpu": "h100_sxm",
    "num_gpus": 1,
    "engine": "trtllm",
    "engine_version": None,
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "config": {"quantization": "bf16", "kv_cache_dtype": "bf16", "tensor_parallel_size": 1},
    "workload": {"protocol": "closed_loop", "concurrency": 32, "isl": 1024, "osl": 256},
    "measured": {
        "ttft_ms": {"mean": 140.0, "p99": 400.0},
        "tpot_ms": {"mean": 11.0},
        "output_tok_per_s": 2500.0,
    },
    "colour": "unknown keys are no reason to skip",
}


def _write(path: Path, *runs: object) -> Path:
    path.write_text("\n".join(json.dumps(run) for run in runs) + "\n")
    return path


def test_json_has_the_documented_form(tmp_path: Path) -> None:
    result = validate(_write(tmp_path / "runs.jsonl", RUN)).to_json()
    assert set(result) == {"overall", "groups", "loads", "rows", "skipped"}
    metrics = result["overall"]["metrics"]
    assert set(metrics) == {"ttft_ms.mean", "ttft_ms.p99", "tpot_ms.mean", "output_tok_per_s"}
    assert set(metrics["tpot_ms.mean"]) == {
        "n",
        "mape_pct",
        "median_ape_pct",
        "bias_pct",
        "coverage_90_pct",
        "interval_90_rel_width_pct",
    }
    [load] = result["loads"]
    assert (load["load"], load["n"]) == (RUN["workload"]["protocol"], 1)  # type: ignore[index]
    assert load["metrics"]["tpot_ms.mean"] == metrics["tpot_ms.mean"]
    group = result["groups"][0]
    assert (group["gpu"], group["model"]) == ("h100_sxm", "meta-llama/Llama-3.1-8B-Instruct")


def test_percentiles_need_enough_requests(tmp_path: Path) -> None:
    few = RUN | {"workload": RUN["workload"] | {"num_requests": 40}}  # type: ignore[operator]
    metrics = validate(_write(tmp_path / "runs.jsonl", few)).to_json()["overall"]["metrics"]
    assert "ttft_ms.p99" not in metrics
    assert "ttft_ms.mean" in metrics


def test_what_was_measured_never_enters(tmp_path: Path) -> None:
    blind = {key: value for key, value in RUN.items() if key != "measured"}
    other = RUN | {"measured": {"tpot_ms": {"mean": 99.0}, "ttft_ms": {"mean": 1.0}}}
    results = [
        validate(_write(tmp_path / f"{i}.jsonl", run)).rows[0].predicted
        for i, run in enumerate((RUN, blind, other))
    ]
    assert results[0] == results[1] == results[2]


def test_real_runs_stripped_of_measurements_predict_the_same(shared: Path, tmp_path: Path) -> None:
    source = shared / "runs" / "trtllm_e2e.jsonl"
    runs = [json.loads(line) for line in source.read_text().splitlines()][::20]
    stripped = [{k: v for k, v in run.items() if k not in ("measured", "notes")} for run in runs]
    full = validate(_write(tmp_path / "full.jsonl", *runs))
    blind = validate(_write(tmp_path / "blind.jsonl", *stripped))
    assert [row.predicted for row in full.rows] == [row.predicted for row in blind.rows]


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("config", {"max_batch_size": "many"}),
        ("config", {"max_num_tokens": -5}),
        ("config", {"tensor_parallel_size": 3}),
        ("workload", {"concurrency": 0}),
        ("workload", {"concurrency": None}),
        ("workload", {"isl": 0}),
        ("workload", {"osl": -3}),
        ("workload", {"num_requests": -1}),
        ("workload", {"protocol": "open_loop"}),
        ("workload", {"protocol": "open_loop", "rate_per_s": 0}),
        ("workload", {"protocol": "open_loop", "rate_per_s": float("nan")}),
    ],
)
def test_damaged_runs_are_skipped_one_by_one(
    tmp_path: Path, part: str, changes: dict[str, object]
) -> None:
    odd = RUN | {part: RUN[part] | changes}  # type: ignore[operator]
    result = validate(_write(tmp_path / "runs.jsonl", odd, RUN))
    assert len(result.rows) == 1
    assert len(result.skipped) == 1


def test_a_run_with_an_unknown_policy_is_skipped_with_the_reason(tmp_path: Path) -> None:
    odd = RUN | {"config": {"capacity_scheduler_policy": "BY_COLOUR"}}
    result = validate(_write(tmp_path / "runs.jsonl", RUN, odd))
    assert len(result.rows) == 1
    assert "capacity_scheduler_policy=BY_COLOUR" in result.skipped[0][1]


def test_a_run_that_cannot_be_predicted_is_skipped_with_the_reason(tmp_path: Path) -> None:
    strange = RUN | {"run_id": "b", "gpu": "abacus"}
    result = validate(_write(tmp_path / "runs.jsonl", RUN, strange))
    assert len(result.rows) == 1
    assert result.skipped[0][0] == "b"
    assert "abacus" in result.skipped[0][1]


def test_accuracy_on_tensorrt_llm_runs(shared: Path) -> None:
    bounds = {"tpot_ms.mean": 6.0, "output_tok_per_s_per_gpu": 6.0, "ttft_ms.mean": 20.0}
    result = validate(shared / "runs" / "trtllm_e2e.jsonl").without_front_end_limited()
    for group in result.groups:
        for metric, bound in bounds.items():
            assert group.metrics[metric].mape_pct < bound
