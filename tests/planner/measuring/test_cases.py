"""What is measured, as cases: how GPUs are named, and what is predicted beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.errors import ProfileError
from executor.backend import load_backend
from executor.case import Case
from planner.measuring.cases import cases_of
from planner.measuring.measure import run_microbench
from planner.measuring.request import MeasureRequest

ROOT = Path(__file__).parents[3]

BURSTY: dict[str, Any] = {
    "schema_version": 1,
    "name": "bursty",
    "model": "llama-3.1-8b",
    "arrival": {"process": "gamma", "rate_per_s": 4, "cv": 3, "num_requests": 40},
    "isl": 64,
    "osl": 8,
}


@pytest.fixture
def workload(tmp_path: Path) -> str:
    path = tmp_path / "bursty.json"
    path.write_text(json.dumps(BURSTY))
    return str(path)


def case(workload: str, *, gpu: str = "h200", seed: int = 0) -> Case:
    request = MeasureRequest(
        backend="vllm", workload=workload, gpu=gpu, seed=seed, random_weights=True
    )
    (found,) = cases_of(request, load_backend("vllm"))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_predicted_beforehand_is_the_arrivals_that_are_sent(
    workload: str, seed: int
) -> None:
    """Forty arrivals in bursts last a third less or more than their mean rate says."""
    one = case(workload, seed=seed)
    arrival_s = one.traffic.protocol.arrival_s  # type: ignore[attr-defined]
    # The engine keeps up: a request takes less than a tenth of a second.
    rate_per_s = len(arrival_s) / (arrival_s[-1] - arrival_s[0])
    assert one.predicted["request_per_s"]["value"] == pytest.approx(rate_per_s, rel=0.03)


def test_runs_name_a_shipped_gpu_by_its_profile_however_it_was_called(workload: str) -> None:
    assert case(workload, gpu="H200").gpu == case(workload, gpu="h200_sxm").gpu == "h200_sxm"
    with pytest.raises(ProfileError, match="h2000"):
        case(workload, gpu="h2000")


def test_runs_name_a_gpu_of_ones_own_by_its_file(tmp_path: Path, workload: str) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((ROOT / "profiles/gpus/h200_sxm.yaml").read_text())
    assert case(workload, gpu=str(mine)).gpu == str(mine)


def test_tables_carry_the_name_that_a_gpu_of_ones_own_has_in_its_file(tmp_path: Path) -> None:
    """`planner calibrate --microbench --gpu FILE` looks for them by that name."""
    pytest.importorskip("torch")
    mine = tmp_path / "mine.yaml"
    shipped = (ROOT / "profiles/gpus/h200_sxm.yaml").read_text()
    mine.write_text(shipped.replace("name: h200_sxm", "name: a_gpu"))
    result, written = run_microbench(
        out=str(tmp_path / "tables"), gpu=str(mine), device="cpu", families=("bandwidth",),
        time_budget_s=20.0,
    )  # fmt: skip
    assert written
    assert {row["system"] for row in result.rows} == {"a_gpu"}
