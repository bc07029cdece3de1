"""`planner measure`, `runs` and `doctor`: from a plan to runs that `planner validate` reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cost_models.errors import ProfileError
from cost_models.profile_io import load_model
from executor.protocols import ClosedLoop, OfflineBurst, OpenLoop
from executor.store import RunStore
from planner.measuring.cases import model_source, plan_configs, traffic_of
from planner.workloads.workload import load_workload
from tests.executor.conftest import DATA, STAND_INS, TINY_LLAMA

ROOT = Path(__file__).parents[3]

WORKLOAD: dict[str, Any] = json.loads((DATA / "few.json").read_text())


def planner(
    folder: Path, *arguments: str, stand_ins: bool = True
) -> subprocess.CompletedProcess[str]:
    programs = [str(STAND_INS), str(Path(sys.executable).parent)] if stand_ins else []
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    program = "from planner.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "few.json").write_text(json.dumps(WORKLOAD))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY_LLAMA))
    return tmp_path


def test_the_embedded_backend_measures_on_a_cpu(folder: Path) -> None:
    pytest.importorskip("transformers")
    result = planner(
        folder, "measure", "--backend", "transformers", "--workload", "few.json", "--model", "tiny",
        "--gpu", "cpu", "--repeats", "1", "--set", "max_batch_size=4", "--set",
        "max_num_tokens=64", "--set", "tokens_per_block=16", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    case = json.loads(result.stdout)["cases"][0]
    assert case["runs"][0]["status"] == "ok"
    assert case["runs"][0]["measured"]["output_tok_per_s"] > 0
    assert "predicted" not in case["runs"][0]
    assert case["repeats"]["num_repeats"] == 1


def test_runs_are_kept_listed_shown_compared_and_validated(folder: Path) -> None:
    common = (
        "measure", "--backend", "vllm", "--workload", "few.json", "--gpu", "h200",
        "--random-weights", "--repeats", "2",
    )  # fmt: skip
    first = planner(folder, *common)
    assert first.returncode == 0, first.stderr
    assert "case 1/1: warm up" in first.stderr
    assert "predicted" in first.stdout
    assert planner(folder, *common, "--set", "max_batch_size=8").returncode == 0
    again = planner(folder, *common)
    assert "2 runs of this case were there before" in again.stdout

    listed = planner(folder, "runs", "list").stdout.splitlines()
    assert len(listed) == 4
    ids = [line.split()[0] for line in listed]
    shown = json.loads(planner(folder, "runs", "show", ids[0], "--json").stdout)
    assert shown["predicted"]["tpot_ms.mean"]["value"] > 0
    assert shown["model"] == "meta-llama/Llama-3.1-8B-Instruct"
    compared = planner(folder, "runs", "compare", ids[0], ids[2]).stdout
    assert "config.max_batch_size: 256 / 8" in compared
    assert "tpot_ms.mean" in compared

    exported = planner(folder, "runs", "export", "out")
    assert exported.stdout.strip() == "out/runs.jsonl"
    validated = json.loads(planner(folder, "validate", "out/runs.jsonl", "--json").stdout)
    assert validated["skipped"] == []
    assert validated["overall"]["n"] == 4
    assert "kv_cache_tokens" in validated["overall"]["metrics"]


def test_the_runs_of_a_gpu_of_ones_own_are_called_after_its_file(folder: Path) -> None:
    profile = (ROOT / "profiles/gpus/h200_sxm.yaml").read_text()
    (folder / "gpus").mkdir()
    (folder / "gpus/mine.yaml").write_text(profile.replace("name: h200_sxm", "name: mine"))
    result = planner(
        folder, "measure", "--backend", "vllm", "--workload", "few.json", "--gpu",
        "gpus/mine.yaml", "--random-weights", "--repeats", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    exported = planner(folder, "runs", "export", "out")
    assert exported.returncode == 0, exported.stderr
    run = json.loads((folder / "out/runs.jsonl").read_text())
    assert run["run_id"].startswith("mine_vllm_")
    assert run["gpu"] == "gpus/mine.yaml"


def test_a_plan_is_measured_on_tensorrt_llm(folder: Path) -> None:
    planned = planner(
        folder, "plan", "--gpu", "h200", "--workload", "few.json", "--trials", "5",
        "--pin", "quantization=bf16", "--pin", "kv_cache_dtype=bf16", "--out", "plan",
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    result = planner(
        folder, "measure", "plan/plan.json", "--backend", "trtllm", "--gpu", "h200",
        "--random-weights", "--repeats", "1", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    run = json.loads(result.stdout)["cases"][0]["runs"][0]
    recommended = json.loads((folder / "plan/plan.json").read_text())["recommended"]["config"]
    assert run["config"].items() <= recommended.items()
    assert run["engine"] == "trtllm"
    lost = planner(folder, "measure", "--backend", "trtllm", "--gpu", "h200")
    assert (lost.returncode, len(lost.stderr.strip().splitlines())) == (2, 1)
    assert "give --workload" in lost.stderr


def test_a_failure_is_exit_status_3_and_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILURE", "out_of_memory_at_start")
    result = planner(
        folder, "measure", "--backend", "vllm", "--workload", "few.json", "--gpu", "h200",
        "--random-weights",
    )  # fmt: skip
    assert result.returncode == 3
    assert "Tried to allocate" in result.stdout
    assert "out_of_memory" in planner(folder, "runs", "list").stdout
    # What failed is exported by name only.
    assert planner(folder, "runs", "export", "out").returncode == 2
    assert planner(folder, "runs", "export", "out", "h200").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backend", "tgi"), "backend 'tgi' is unknown"),
        (("--backend", "vllm", "--store", "few.json/x.db"), "its folder exists"),
        (("--backend", "vllm", "--time-budget", "nan"), "must be above 0"),
        (("--backend", "vllm", "--set", "max_batch=3"), "max_batch"),
        (("plan.json", "--backend", "vllm"), "plan.json"),
    ],
)
def test_wrong_usage_is_one_line(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    result = planner(folder, "measure", "--workload", "few.json", "--gpu", "h200", *arguments)
    assert result.returncode in (2, 3)
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr


def test_the_doctor_names_every_backend_and_what_it_lacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = json.loads(planner(folder, "doctor", "--json").stdout)
    assert set(state["backends"]) == {"endpoint", "transformers", "trtllm", "trtllm-bench", "vllm"}
    assert state["backends"]["endpoint"]["can_run"] is True
    said = planner(folder, "doctor").stdout
    assert "endpoint" in said
    monkeypatch.setenv("PATH", "/nonexistent")
    without = planner(folder, "doctor", stand_ins=False).stdout
    for name in ("trtllm", "vllm"):
        assert f"{name:14} {name.replace('trtllm', 'trtllm-serve')} is not installed" in without
        assert f"pip install 'trtllm-planner[{name}]'" in without


def test_workloads_share_a_start_of_the_engine(folder: Path) -> None:
    longer = {**WORKLOAD, "name": "longer", "osl": 6, "max_output_tokens": 6}
    (folder / "longer.json").write_text(json.dumps(longer))
    result = planner(
        folder, "measure", "--backend", "vllm", "--gpu", "h200", "--random-weights",
        "--repeats", "1", "--set", "max_seq_len=64",
        "--workload", "few.json", "--workload", "longer.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(": start,") == 1
    assert "case 2, run 1" in result.stderr
    listed = planner(folder, "runs", "list").stdout.splitlines()
    assert len(listed) == 2


def test_an_empty_store_has_nothing_to_export(folder: Path) -> None:
    missing = planner(folder, "runs", "export", "out")
    assert missing.returncode == 2
    assert "planner-runs.db: no such file; planner measure makes one" in missing.stderr
    RunStore(str(folder / "planner-runs.db")).close()
    result = planner(folder, "runs", "export", "out")
    assert result.returncode == 2
    assert "holds no runs that ended well" in result.stderr


def workload_file(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**WORKLOAD, **changes}))
    return str(path)


def test_workloads_become_requests_and_their_section(tmp_path: Path) -> None:
    closed = traffic_of(load_workload(workload_file(tmp_path)))
    assert closed.protocol == ClosedLoop(concurrency=2)
    assert closed.workload == {
        "protocol": "closed_loop", "num_requests": 6, "concurrency": 2, "isl": 16, "osl": 4,
    }  # fmt: skip
    arrival = {"process": "gamma", "rate_per_s": 5.0, "cv": 2.0}
    gamma = traffic_of(load_workload(workload_file(tmp_path, arrival=arrival)), num_requests=40)
    assert isinstance(gamma.protocol, OpenLoop)
    assert len(gamma.protocol.arrival_s) == 40
    assert gamma.workload["burstiness"] == 0.25
    offline = {"process": "offline", "num_requests": 5000}
    burst = traffic_of(load_workload(workload_file(tmp_path, arrival=offline)))
    assert burst.protocol == OfflineBurst()
    assert len(burst.isl) == 2000


def test_the_most_promising_alternatives_come_first(tmp_path: Path) -> None:
    def entry(batch: int, value: float, high: float) -> dict[str, Any]:
        metric = {"value": value, "interval_90": [0.9 * value, high]}
        return {
            "config": {"max_batch_size": batch, "num_gpus": 1},
            "predicted": {"output_tok_per_s_per_gpu": metric},
        }

    plan = {
        "objective": "throughput",
        "recommended": entry(1, 100.0, 110.0),
        "alternatives": [entry(2, 95.0, 99.0), entry(3, 90.0, 130.0), entry(4, 50.0, 105.0)],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    chosen = plan_configs(path, top=3)
    assert [config.max_batch_size for config in chosen] == [1, 3, 4]
    path.write_text("{}")
    with pytest.raises(ProfileError, match="not a plan"):
        plan_configs(path)


def test_where_a_models_files_are(folder: Path) -> None:
    shipped = model_source("llama-3.1-8b", load_model("llama-3.1-8b"))
    assert (shipped.has_random_weights, shipped.folder) == (False, None)
    assert shipped.hf_config["architectures"] == ["LlamaForCausalLM"]
    tiny = str(folder / "tiny")
    assert model_source(tiny, load_model(tiny)).has_random_weights
    (folder / "tiny" / "model.safetensors").touch()
    real = model_source(tiny, load_model(tiny))
    assert (real.has_random_weights, real.folder) == (False, folder / "tiny")
    assert real.label == "tiny"
