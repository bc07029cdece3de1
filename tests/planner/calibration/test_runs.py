"""Fitting serving runs: another machine is met, one run wrecks nothing, silence is said."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.profile_io import load_gpu
from engines.registry import engine_constants, load_calibration
from planner.calibration import runs as under_test
from planner.calibration.constants import shipped_priors
from planner.calibration.fit import Fit, calibrated, fit_constants
from planner.calibration.runs import calibrate_runs
from planner.calibration.steps import RUN_LOG_SD
from planner.validation.validate import predict_run, predict_run_with, validate
from planner.workloads.measured import MeasuredRun, read_runs

MEASURED = ("tpot_ms", "itl_ms", "output_tok_per_s", "e2el_ms", "ttft_ms")

SLOW = {"host_s": 1.5e-3, "gemm_row_excess": 0.3}
"""Constants of a machine with a slow host whose clock falls under load."""


def _run(number: int, workload: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1, "run_id": f"run-{number}", "gpu": "h200", "num_gpus": 1,
        "engine": "vllm", "engine_version": "0.25.1", "model": "llama-3.1-8b",
        "config": {"quantization": "bf16", "kv_cache_dtype": "bf16", "max_num_tokens": 4096},
        "workload": {"num_requests": 24, "osl": 48, **workload}, "measured": {"tpot_ms.mean": 1.0},
    }  # fmt: skip


WORKLOADS = (
    {"protocol": "closed_loop", "concurrency": 2, "isl": 64},
    {"protocol": "closed_loop", "concurrency": 8, "isl": 1500},
    {"protocol": "closed_loop", "concurrency": 12, "isl": 600},
    {"protocol": "open_loop", "rate_per_s": 20.0, "isl": 900},
)


def write(path: Path, runs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return path


@pytest.fixture(scope="module")
def runs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as the slow machine would have measured them: the model's own words."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [_run(number, workload) for number, workload in enumerate(WORKLOADS)]
    asked = list(_read(write(folder / "asked.jsonl", runs)))
    shipped = engine_constants("vllm")["step"]
    values = {**{name: shipped[name] for name in SLOW}, **SLOW}
    for run, read in zip(runs, asked, strict=True):
        run["measured"] = _as_measured(predict_run_with(read, calibrated(read, values)).predicted)
    return write(folder / "runs.jsonl", runs)


def _as_measured(predicted: Mapping[str, float]) -> dict[str, Any]:
    """Return a prediction as a runs file holds a measurement."""
    measured: dict[str, Any] = {}
    for name, value in predicted.items():
        metric, _, statistic = name.partition(".")
        if metric in MEASURED and statistic:
            measured.setdefault(metric, {})[statistic] = value
        elif metric in MEASURED:
            measured[metric] = value
    return measured


def _read(path: Path) -> list[MeasuredRun]:
    return [run for run, _, _ in read_runs(path) if run is not None]


@pytest.fixture(scope="module")
def fitted(runs_file: Path) -> Fit:
    return fit_constants(_read(runs_file))


def test_another_machine_is_predicted_after_the_fit(fitted: Fit, runs_file: Path) -> None:
    """Constants that do the same share what was changed, so predictions are what comes back."""
    before = validate(runs_file).overall["tpot_ms.mean"].mape_pct
    after = [
        abs(row.predicted["tpot_ms.mean"] / row.run.measured["tpot_ms.mean"] - 1)
        for row in (predict_run_with(r, calibrated(r, fitted.values)) for r in _read(runs_file))
    ]
    assert before > 8
    assert max(after) < RUN_LOG_SD  # what every run may be off by itself


def test_what_runs_cannot_tell_stays_and_is_said(fitted: Fit) -> None:
    """BF16 runs on one GPU are silent on FP8, on tensor parallelism and on experts."""
    silent = {"tp_gap_s", "moe", "attention_decode_fp8_bytes_per_flop", "fp8_wide_gemm_s"}
    assert silent <= set(fitted.not_told)
    assert "host_s" not in fitted.not_told
    assert fitted.values["moe"] == pytest.approx(1.0)
    assert any("not told by these runs" in line for line in fitted.lines())


def test_one_strange_run_wrecks_nothing(runs_file: Path, tmp_path: Path) -> None:
    """A run that took ten times as long moves the prediction of another load by little."""
    strange = json.loads(runs_file.read_text().splitlines()[0])
    for metric in ("tpot_ms", "itl_ms", "e2el_ms", "ttft_ms"):
        strange["measured"][metric] = {k: 10 * v for k, v in strange["measured"][metric].items()}
    strange["measured"]["output_tok_per_s"] /= 10
    [odd] = _read(write(tmp_path / "odd.jsonl", [strange]))
    values = fit_constants([odd]).values
    other = _read(runs_file)[1]
    usual = predict_run(other).predicted["tpot_ms.mean"]
    moved = predict_run_with(other, calibrated(other, values)).predicted["tpot_ms.mean"]
    assert moved < 2.5 * usual


def test_a_run_on_a_machine_that_was_a_little_slow_moves_little(tmp_path: Path) -> None:
    """3.5 % slower steps make 7 % of TPOT and 9 % of TTFT; it is expected of any single run."""
    asked = _run(0, {"protocol": "open_loop", "rate_per_s": 30.0, "isl": 900, "num_requests": 120})
    [usual] = _read(write(tmp_path / "asked.jsonl", [asked]))
    slow = predict_run_with(usual, calibrated(usual, {}).slower(1.035)).predicted
    assert slow["tpot_ms.mean"] > 1.06 * predict_run(usual).predicted["tpot_ms.mean"]
    runs = _read(write(tmp_path / "slow.jsonl", [asked | {"measured": _as_measured(slow)}]))
    priors = shipped_priors(engine_constants("vllm"))
    values = fit_constants(runs, priors=priors).values
    moved = {
        name: abs(math.log(values[name] / constant.prior)) / constant.log_sd
        for name, constant in priors.items()
    }
    assert max(moved.values()) < 0.3


def test_the_command_writes_a_file_that_the_others_read(runs_file: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [json.loads(runs_file.read_text().splitlines()[1])])
    out = tmp_path / "mine.json"
    done = subprocess.run(
        [sys.executable, "-m", "planner", "calibrate", "--runs", str(few), "--engine", "vllm",
         "--out", str(out)],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not told by these runs" in done.stdout
    written = json.loads(out.read_text())
    assert written["data"]["runs"] == ["run-1"]
    # By the profile's name, however the run spells it: a file of one's own may move.
    assert written["data"]["gpus"] == ["h200_sxm"]
    assert written["data"]["operators"] == [
        "attention_decode/bfloat16", "attention_prefill/bfloat16", "gemm/bfloat16"
    ]  # fmt: skip
    assert "tp_gap_s" in written["not_told"]
    assert set(written["relative_errors"]) >= {"host_s", "gemm"}
    shipped = validate(runs_file).overall["tpot_ms.mean"].mape_pct
    own = validate(runs_file, calibration=str(out)).overall["tpot_ms.mean"].mape_pct
    assert own < shipped


def test_where_the_priors_stay_the_host_stays_unknown(
    runs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that loses teaches nothing: neither constants nor intervals nor whose host it is."""
    lost = under_test.kept_where_it_gains
    monkeypatch.setattr(
        under_test,
        "kept_where_it_gains",
        lambda checked, priors: (replace(lost(checked, priors)[0], has_taught=False), []),
    )
    few = write(tmp_path / "few.jsonl", [json.loads(runs_file.read_text().splitlines()[1])])
    out = tmp_path / "mine.json"
    calibrate_runs([str(few)], engine="vllm", out=str(out))
    gpu = load_gpu("h200")
    own, shipped = load_calibration(gpu, "vllm", own=[out]), load_calibration(gpu, "vllm")
    assert own.borrows_host
    assert own.intervals == shipped.intervals
