"""The folder of a plan: written whole, replaced, and never over files of somebody else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cost_models.errors import PlannerError
from planner.plans.artifacts import write_plan_files
from planner.plans.make import plan
from planner.question import PlanRequest, load_problem


def test_a_plan_is_written_whole_and_replaced(tmp_path: Path) -> None:
    out = tmp_path / "plan"
    result = plan(PlanRequest(gpu="h100", workload="chat", trials=0))
    problem = load_problem(gpu="h100", workload="chat")
    for _ in range(2):
        write_plan_files(result, problem=problem, folder=out)
    assert {path.name for path in out.iterdir()} >= {
        "plan.json", "llm_api_options.yaml", "serve.sh", "bench.sh", "dataset.jsonl", "quantize.sh",
    }  # fmt: skip
    assert os.access(out / "serve.sh", os.X_OK)
    assert list(tmp_path.iterdir()) == [out]
    lines = (out / "dataset.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"task_id", "input_ids", "output_tokens"} for line in lines)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    result = plan(PlanRequest(gpu="h100", workload="chat", trials=0))
    with pytest.raises(PlannerError, match="not a plan"):
        write_plan_files(result, problem=load_problem(gpu="h100", workload="chat"), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_plan_for_another_engine_leaves_no_files_of_the_one_before(tmp_path: Path) -> None:
    for engine, scripts in (("trtllm", True), ("vllm", False)):
        result = plan(PlanRequest(gpu="h100", workload="chat", engine=engine, trials=0))
        problem = load_problem(gpu="h100", workload="chat", engine=engine)
        write_plan_files(result, problem=problem, folder=tmp_path / "plan")
        assert (tmp_path / "plan" / "serve.sh").exists() is scripts
