"""The slowness of a host: one number, told by a few runs, that leaves the GPU as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.calibration_io import load_calibration
from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepBatch, StepModel
from planner.calibration.fit import METRIC_LOG_SD, calibrated
from planner.calibration.host import fit_host, on_host
from planner.measuring.runs import MeasuredRun, parse_run
from planner.validation.validate import predict_run_with

SLOWNESS = 1.7


def asked(number: int, workload: dict[str, Any]) -> MeasuredRun:
    return parse_run(
        {
            "schema_version": 1, "run_id": f"run-{number}", "gpu": "h100", "num_gpus": 1,
            "engine": "vllm", "engine_version": "0.25.1", "model": "llama-3.1-8b",
            "config": {"quantization": "bf16", "kv_cache_dtype": "fp8", "max_num_tokens": 1024},
            "workload": {"num_requests": 24, "osl": 48, **workload}, "measured": {},
        },
        Path(),
    )  # fmt: skip


def test_three_runs_tell_how_slow_the_host_is() -> None:
    runs = [
        asked(0, {"protocol": "closed_loop", "concurrency": 8, "isl": 600}),
        asked(1, {"protocol": "closed_loop", "concurrency": 16, "isl": 100}),
        asked(2, {"protocol": "open_loop", "rate_per_s": 20.0, "isl": 900}),
    ]
    measured = []
    for run in runs:
        predicted = predict_run_with(run, on_host(calibrated(run, {}), SLOWNESS)).predicted
        known = {name: predicted[name] for name in METRIC_LOG_SD}
        measured.append(replace(run, measured=known))
    fit = fit_host(measured)
    assert f"{fit.slowness:.2f} times as long" in fit.line()
    assert fit.slowness == pytest.approx(SLOWNESS, rel=0.03)
    assert fit.relative_error < 0.05


def test_a_slow_host_leaves_the_gpu_alone() -> None:
    gpu = load_gpu("h100")
    fast = load_calibration(gpu, "vllm")
    config = EngineConfig(kv_cache_dtype="bf16", max_batch_size=64, cuda_graph_max_batch_size=64)
    batch = StepBatch(
        decode_sequences=np.array([8.0, 8.0]), decode_kv_len=500.0,
        prefill_sequences=np.array([0.0, 1.0]), prefill_tokens=np.array([0.0, 200.0]),
    )  # fmt: skip
    costs = [
        StepModel(
            model=load_model("llama-3.1-8b"), config=config, gpu=gpu, calibration=calibration
        ).cost(batch).by_family
        for calibration in (fast, on_host(fast, 2.0))
    ]  # fmt: skip
    before, after = costs
    for family in before.keys() - {"host", "launch"}:
        np.testing.assert_array_equal(before[family], after[family])
    np.testing.assert_allclose(after["host"], 2 * before["host"])
    assert (after["launch"] > before["launch"]).all()
