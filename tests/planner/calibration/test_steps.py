"""Steps read from the times of tokens, and constants from those steps: simulated runs know both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.cluster import Cluster
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepModel
from engines.registry import engine_constants, load_calibration
from planner.calibration.constants import fitted_constants, shipped_priors, with_constants
from planner.calibration.steps import SeenRun, Windows, fit_steps, windows_of
from planner.calibration.streams import observed_steps
from planner.prediction.evaluator import Evaluator, Slice
from planner.prediction.predict import single
from planner.prediction.simulation import simulate_deployment
from planner.simulator import SimulationResult
from planner.workloads.demand import workload_demand
from planner.workloads.workload import load_workload

CONFIG = EngineConfig(
    max_batch_size=64, max_num_tokens=1024, tokens_per_block=16, enable_chunked_prefill=True,
    capacity_scheduler_policy="RECOMPUTE", cuda_graph_max_batch_size=512, cuda_graph_padding=True,
    quantization="bf16", kv_cache_dtype="bf16",
)  # fmt: skip
SLOW = {"host_s": 2e-3, "gemm": 1.2}
"""A machine with a slow host and slow GEMMs."""


def served(evaluator: Evaluator, demand: Any) -> SimulationResult:
    deployment = Deployment.of(CONFIG, Cluster(gpu=evaluator.gpu))
    memory = single(evaluator.evaluate(Slice(base=deployment)).memory)
    return simulate_deployment(evaluator, deployment, memory, demand)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    gpu = load_gpu("h200")
    calibration = load_calibration(gpu, "vllm")
    quiet = replace(calibration.front_end, streamed_token_s=0.0, streamed_chunk_s=0.0)
    workload = load_workload("chat")
    return Evaluator(
        model=load_model("llama-3.1-8b"), gpu=gpu, load=workload.load(), slo={},
        calibration=with_constants(replace(calibration, front_end=quiet), SLOW),
    )  # fmt: skip


@pytest.fixture(scope="module")
def requests(evaluator: Evaluator) -> list[dict[str, Any]]:
    """What a client of the slow machine would have kept."""
    workload = load_workload("chat")
    arrival = replace(workload.arrival, num_requests=150)
    result = served(evaluator, workload_demand(replace(workload, arrival=arrival), seed=1))
    rows = []
    for index in range(len(result.requests.arrival_s)):
        token_s = result.token_times(index)
        arrival_s = float(result.requests.arrival_s[index])
        rows.append({
            "arrival_s": arrival_s, "isl": int(result.requests.isl[index]),
            "osl": int(result.requests.osl[index]), "ttft_ms": 1e3 * (token_s[0] - arrival_s),
            "itl_ms": (1e3 * np.diff(token_s)).tolist(),
        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def shipped_model(evaluator: Evaluator) -> StepModel:
    """The step model under the shipped constants."""
    model = evaluator.calibrated(load_calibration(evaluator.gpu, "vllm")).step_model(CONFIG)
    assert isinstance(model, StepModel)
    return model


@pytest.fixture(scope="module")
def windows(requests: list[dict[str, Any]]) -> Windows:
    found = windows_of(observed_steps(requests, CONFIG.max_num_tokens))
    assert found is not None
    return found


def test_every_token_belongs_to_a_step(requests: list[dict[str, Any]]) -> None:
    steps = observed_steps(requests, CONFIG.max_num_tokens)
    assert steps.decoding.sum() + len(requests) == sum(row["osl"] for row in requests)
    assert steps.prompt_tokens.sum() == sum(row["isl"] for row in requests)
    assert (np.diff(steps.output_s) > 0).all()
    within = ~steps.overfull
    assert (steps.prompt_tokens + steps.decoding)[within].max() <= CONFIG.max_num_tokens + 0.5


def test_the_steps_tell_what_is_slow(windows: Windows, shipped_model: StepModel) -> None:
    seen = SeenRun(run_id="slow", windows=windows, model=shipped_model)
    fit = fit_steps([seen], fitted_constants(engine_constants("vllm")))
    before = np.abs(seen.misses({})).mean()
    assert np.abs(seen.misses(fit.values)).mean() < before / 5
    assert "attention_decode_fp8_bytes_per_flop" not in fit.values


def run_of(windows: Windows, model: StepModel, *, name: str, took_s: Any, copies: int = 1) -> Any:
    """A run whose windows took this long, each seen so many times."""
    seen = replace(
        windows,
        rows=np.tile(windows.rows, (copies, 1)),
        steps=np.tile(windows.steps, copies),
        took_s=np.tile(took_s, copies),
    )
    return SeenRun(run_id=name, windows=seen, model=model)


def test_thousands_of_windows_of_a_run_move_no_further_than_a_few_runs(
    windows: Windows, shipped_model: StepModel
) -> None:
    """All steps took a tenth longer: one run may be peculiar, eight are not."""
    usual_s = windows.predicted_s(shipped_model)

    def moved(runs: int, copies: int = 1) -> float:
        seen = [
            run_of(windows, shipped_model, name=str(run), took_s=1.1 * usual_s, copies=copies)
            for run in range(runs)
        ]
        fit = fit_steps(seen, shipped_priors(engine_constants("vllm")))
        calibration = with_constants(shipped_model.calibration, fit.values)
        found_s = windows.predicted_s(replace(shipped_model, calibration=calibration))
        return float(np.log(found_s / usual_s).mean() / np.log(1.1))

    assert len(windows) * 100 > 2000
    assert moved(1, copies=100) < moved(2) < 0.9
    assert moved(8) > 0.9


def test_a_slow_host_that_the_gpu_hid_is_not_taken_for_slow_kernels(
    windows: Windows, shipped_model: StepModel
) -> None:
    """From the priors its launches have no slope: a start with a slow host shows them."""
    eager = replace(shipped_model, config=replace(CONFIG, cuda_graph_max_batch_size=64))
    table = shipped_priors(engine_constants("vllm"))
    hidden = {"eager_layer_s": 4e-4, "eager_sequence_s": 2e-5}
    priors = table | {name: replace(table[name], prior=found) for name, found in hidden.items()}

    def on_host(eager_layer_s: float) -> StepModel:
        found = {**hidden, "eager_layer_s": eager_layer_s}
        return replace(eager, calibration=with_constants(eager.calibration, found))

    took_s = windows.predicted_s(on_host(8e-4))
    seen = [run_of(windows, on_host(4e-4), name=str(run), took_s=took_s) for run in range(4)]
    values = fit_steps(seen, priors).values
    assert values["eager_layer_s"] == pytest.approx(8e-4, rel=0.1)
    for kernel in ("elementwise_efficiency", "gemm", "gemm_row_excess"):
        assert values[kernel] == pytest.approx(priors[kernel].prior, rel=0.05)


def test_where_tokens_come_together_steps_are_not_counted(requests: list[dict[str, Any]]) -> None:
    """Of two steps whose tokens leave in one chunk a client sees one, twice as long."""
    merged = [
        row | {"itl_ms": np.add.reduceat(row["itl_ms"], range(0, len(row["itl_ms"]), 2)).tolist()}
        for row in requests
        if row["itl_ms"]
    ]
    steps = observed_steps(merged, CONFIG.max_num_tokens)
    assert steps.merged.mean() == pytest.approx(0.5, abs=0.05)
    assert windows_of(steps) is None
