"""The commands as a person or a script runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

ROOT = Path(__file__).parents[3]

CHAT = ("plan", "--gpu", "h100", "--workload", "chat")
PREDICT = ("predict", "--gpu", "h100", "--workload", "chat")


def run(*arguments: str, command: str = "main") -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys; from planner.cli.main import {command}; sys.argv[0] = 'planner'; {command}()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_plan_is_feasible_json_with_the_documented_keys() -> None:
    result = run(
        "--gpu", "h100", "--workload", "profiles/workloads/chat.json", "--json", command="plan_main"
    )
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["status"] == "feasible"
    assert set(plan) >= {"recommended", "alternatives", "pareto", "binding_limit", "search"}
    assert set(plan["search"]) >= {"num_evaluated", "wall_s", "seed"}
    best = plan["recommended"]
    assert set(best) >= {"config", "predicted", "memory", "step_time_breakdown"}
    assert set(best["memory"]) >= {
        "weight_bytes_per_gpu",
        "kv_cache_bytes_per_gpu",
        "kv_cache_tokens",
        "kv_cache_blocks",
        "max_sequences",
        "activation_bytes_per_gpu",
        "cuda_graph_bytes_per_gpu",
        "reserved_bytes_per_gpu",
        "free_bytes_per_gpu",
    }
    for metric in ("ttft_ms.p99", "tpot_ms.mean", "output_tok_per_s_per_gpu"):
        low, high = best["predicted"][metric]["interval_90"]
        assert low <= best["predicted"][metric]["value"] <= high
    assert all(alternative["rejected_because"] for alternative in plan["alternatives"])


def test_a_person_reads_the_reasons() -> None:
    result = run("plan", "--gpu", "h200", "--workload", "summarization")
    assert result.returncode == 0, result.stderr
    for text in ("Binding limit", "What changing one knob would do", "Best rejected", "Memory of"):
        assert text in result.stdout


def test_an_slo_that_nothing_meets_is_an_answer_with_status_1() -> None:
    result = run(
        "plan", "--gpu", "h100", "--workload", "chat", "--slo", "tpot_ms.p99=0.5", "--json"
    )
    assert result.returncode == 1
    plan = json.loads(result.stdout)
    assert plan["status"] == "infeasible"
    assert any(r["limit"] == "tpot_ms.p99" and r["needed"] > 0.5 for r in plan["relaxations"])


def test_a_70b_model_on_one_80_gb_gpu_gets_a_quantization_that_fits() -> None:
    loose = ("--slo", "ttft_ms.p99=100000", "--slo", "tpot_ms.p99=10000")
    result = run(*CHAT, "--model", "llama-3.1-70b", "--json", *loose)
    plan = json.loads(result.stdout)
    memory = plan["recommended"]["memory"]
    assert memory["fits"]
    assert plan["recommended"]["config"]["quantization"] != "bf16"


def test_predict_defaults_are_the_engines_and_refuse_long_prompts() -> None:
    result = run("predict", "--gpu", "h100", "--workload", "chat", "--json")
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    config = found["config"]
    (refused,) = found["refusals"]
    assert refused["limit"] == "max_num_tokens"
    assert 8192 < refused["accepted_from"] < config["max_seq_len"]
    assert found["highest_rate_per_s"] == 0
    assert (config["max_batch_size"], config["max_num_tokens"]) == (2048, 8192)
    assert config["enable_chunked_prefill"] is False


def test_what_does_not_fit_is_an_answer() -> None:
    result = run(
        "predict", "--gpu", "l4", "--workload", "chat", "--model", "llama-3.1-70b", "--json"
    )
    assert result.returncode == 1
    assert json.loads(result.stdout)["memory"]["shortfall_bytes"] > 0
    assert "Traceback" not in result.stderr


def test_predict_reads_tensorrt_llm_yaml(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("max_batch_size: 64\nkv_cache_config:\n  free_gpu_memory_fraction: 0.5\n")
    result = run("predict", "--gpu", "h100", "--workload", "chat", "--json", "--config", str(file))
    config = json.loads(result.stdout)["config"]
    assert (config["max_batch_size"], config["free_gpu_memory_fraction"]) == (64, 0.5)


WRONG = [
    (["plan", "--gpu", "h101", "--workload", "chat"], "h100"),
    (["plan", "--gpu", "h100", "--workload", "chats"], "chat"),
    ([*CHAT, "--model", "llama-9"], "llama"),
    ([*CHAT, "--pin", "max_batch=3"], "max_batch_size"),
    ([*CHAT, "--pin", "max_batch_size=-3"], "accepted"),
    ([*CHAT, "--pin", "quantization=nvfp4"], "sm90"),
    ([*CHAT, "--slo", "ttft=3"], "ttft_ms"),
    ([*CHAT, "--slo", "ttft_ms.p99=nan"], "milliseconds"),
    ([*CHAT, "--num-gpus", "64"], "1 to 8"),
    ([*CHAT, "--objective", "speed"], "goodput"),
    ([*CHAT, "--time-budget", "nan"], "at least"),
    ([*PREDICT, "--set", "tensor_parallel_size=5"], "divide"),
    (["predict", "--gpu", "a100", "--workload", "chat", "--set", "quantization=fp8"], "cannot run"),
    ([*PREDICT, "--set", "free_gpu_memory_fraction=nan"], "number"),
    (["validate", "missing.jsonl"], "missing.jsonl"),
    (["validate", "--operators", "missing.csv"], "missing.csv"),
    (["validate"], "runs"),
    (["measure"], "planner doctor"),
    ([*CHAT, "--storage", "nonsense://"], "sqlite:///"),
    ([*CHAT, "--storage", "sqlite:////nowhere/at/all.db"], "sqlite:///"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "hint"), WRONG, ids=lambda v: " ".join(v)[-50:])
def test_wrong_input_is_one_line_and_status_2(arguments: list[str], hint: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert hint in lines[0]


BROKEN_FILES = {
    "truncated.json": b'{"schema_version": 1, "name": "x"',
    "binary.json": bytes(range(256)),
    "list.json": b"[1, 2]",
    "nan.json": b'{"schema_version": NaN}',
    "unknown_key.json": b'{"schema_version": 1, "name": "x", "colour": 3}',
    "empty.csv": b"TIMESTAMP,ContextTokens,GeneratedTokens\n",
    "wrong.csv": b"a,b\n1,2\n",
    "empty.jsonl": b"",
    "negative.jsonl": b'{"timestamp": 0, "input_length": -4, "output_length": 1}\n' * 2,
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_workload_file_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(BROKEN_FILES[name])
    out = tmp_path / "out"
    result = run(
        "plan",
        "--gpu",
        "h100",
        "--workload",
        str(file),
        "--model",
        "llama-3.1-8b",
        "--out",
        str(out),
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert name in result.stderr
    assert not out.exists()


def test_a_stored_study_goes_on(tmp_path: Path) -> None:
    storage = ("--storage", f"sqlite:///{tmp_path}/plan.db", "--trials", "5", "--json")
    for _ in range(2):
        assert run(*CHAT, *storage, "--time-budget", "120").returncode == 0
    study = optuna.load_study(study_name="plan", storage=f"sqlite:///{tmp_path}/plan.db")
    assert len([t for t in study.trials if t.state.is_finished()]) == 10


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['planner', '--help']\n"
        "from planner.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'scipy', 'optuna', 'pydantic', 'textual', 'torch', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_planning_needs_no_scipy() -> None:
    program = (
        "import sys\nfrom planner import PlanRequest, plan\n"
        "plan(PlanRequest(gpu='h100', workload='chat', trials=5))\n"
        "heavy = {'scipy', 'torch', 'textual', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_profiles_are_listed_shown_and_checked() -> None:
    assert "llama-3.1-8b" in run("profiles", "list").stdout
    assert "hbm_bytes_per_s" in run("profiles", "show", "h100").stdout
    assert "GPU NVIDIA H100" in run("profiles", "check", "profiles/gpus/h100_sxm.yaml").stdout


def _run_program(program: str) -> None:
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_predict_says_what_drafts_are_assumed_to_be(tmp_path: Path) -> None:
    drafting = (
        "predict", "--gpu", "h200", "--engine", "vllm", "--workload", "tests/data/few.json",
        "--set", "decoding_type=NGram", "--set", "max_draft_len=3",
    )  # fmt: skip
    result = run(*drafting)
    assert result.returncode == 0, result.stderr
    assert "tokens a step; right with 0.45, 0.60, 0.70 by position" in result.stdout
    assert "(prior: prompt lookup" in result.stdout
    assert "not deployable" not in result.stdout
    gaps = run(*drafting, "--requests-out", str(tmp_path / "requests.jsonl"), "--itl")
    assert (gaps.returncode, gaps.stderr.count("\n")) == (2, 1)
    assert "--itl" in gaps.stderr


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (("decoding_type=Guess",), "known: NGram"),
        (("decoding_type=DraftTarget", "max_draft_len=3"), "give speculative_model"),
        (("decoding_type=NGram", "max_draft_len=99"), "accepted: 0 to 64"),
    ],
)
def test_drafts_that_cannot_be_are_one_line(knobs: tuple[str, ...], said: str) -> None:
    settings = [part for knob in knobs for part in ("--set", knob)]
    result = run("predict", "--gpu", "h200", "--workload", "tests/data/few.json", *settings)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr
