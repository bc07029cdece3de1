"""Where the block size moves attention, where it only makes a prediction less sure."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepBatch, StepModel
from engines.registry import load_calibration
from planner.prediction.evaluator import Slice
from planner.prediction.fusion import fusion_savings
from planner.prediction.intervals import UNKNOWN_BLOCK_EFFECT, block_size_error
from planner.prediction.predict import predict_deployment
from planner.question import load_problem

H200 = load_gpu("h200")
DECODE = StepBatch(decode_sequences=16.0, decode_kv_len=8192.0)


def step_of(engine: str, **knobs: object) -> StepModel:
    return StepModel(
        model=load_model("llama-3.1-8b"),
        config=EngineConfig(**knobs),  # type: ignore[arg-type]
        gpu=H200,
        calibration=load_calibration(H200, engine=engine),
    )


def attention_s(engine: str, **knobs: object) -> float:
    return float(step_of(engine, **knobs).cost(DECODE).by_family["attention_decode"])


def test_vllm_reads_an_fp8_cache_faster_in_large_blocks() -> None:
    """By 3.5 to 7.5 % from 16 to 128 (three doublings of 1.15 to 2.55 %); a BF16 cache alike."""
    small, large = (
        attention_s("vllm", kv_cache_dtype="fp8", tokens_per_block=size) for size in (16, 128)
    )
    assert 0.035 < 1 - large / small < 0.075
    plain = {attention_s("vllm", tokens_per_block=size) for size in (16, 32, 64, 128)}
    assert len(plain) == 1


def test_tensorrt_llm_stays_neutral() -> None:
    times = {
        attention_s("trtllm", kv_cache_dtype="fp8", tokens_per_block=size) for size in (32, 64, 128)
    }
    assert len(times) == 1


def test_rows_of_a_slice_feel_their_own_block_size() -> None:
    problem = load_problem(gpu="h200", workload="rag", engine="vllm")
    base = replace(problem.default_config, kv_cache_dtype="fp8", cuda_graph_max_batch_size=512)
    sizes = np.array([16, 128])
    together = problem.evaluator.evaluate(
        Slice(base=problem.deployment_of(base), columns={"tokens_per_block": sizes})
    )
    for row, size in enumerate(sizes.tolist()):
        alone = problem.evaluator.evaluate(
            Slice(base=problem.deployment_of(replace(base, tokens_per_block=size)))
        )
        together_ms = together.metrics["tpot_ms.mean"][row]
        assert together_ms == pytest.approx(alone.metrics["tpot_ms.mean"][0])
    assert together.metrics["tpot_ms.mean"][1] < together.metrics["tpot_ms.mean"][0]


def test_an_unmeasured_block_size_widens_the_interval() -> None:
    trtllm, vllm = (load_calibration(H200, engine=engine) for engine in ("trtllm", "vllm"))
    blocks = {size: EngineConfig(tokens_per_block=size) for size in (32, 64, 128)}
    error = {
        size: block_size_error("tpot_ms.mean", config, trtllm, attention_share=0.5)
        for size, config in blocks.items()
    }
    assert error[64] == 0
    assert error[32] == error[128] == pytest.approx(0.5 * UNKNOWN_BLOCK_EFFECT / 1.645)
    for name, calibration in (
        ("ttft_ms.mean", trtllm),
        ("kv_cache_tokens", trtllm),
        ("tpot_ms.mean", vllm),
    ):
        assert block_size_error(name, blocks[32], calibration, attention_share=0.5) == 0


def test_the_widening_reaches_a_prediction() -> None:
    problem = load_problem(gpu="h100", workload="rag")
    widths = []
    for size in (64, 128):
        config = replace(problem.default_config, tokens_per_block=size)
        found = predict_deployment(problem.evaluator, problem.deployment_of(config))
        low, high = found.metrics["tpot_ms.mean"].interval_90
        widths.append(math.log(high / low))
    assert widths[0] < widths[1] < widths[0] * 1.1


def test_fusion_is_worth_more_the_more_is_prefilled() -> None:
    step = step_of("trtllm")
    decode = fusion_savings(step, DECODE)
    mixed = fusion_savings(step, replace(DECODE, prefill_sequences=1.0, prefill_tokens=4096.0))
    assert all(0 < decode[name] < mixed[name] for name in decode)
    # Scores of 32 layers of 32 heads over 16 × 8,192 cached tokens, 8 bytes each, in 3 kernels.
    constants = step.calibration.step
    bytes_per_s = constants.elementwise_efficiency * H200.hbm_bytes_per_s
    expected_s = 32 * (32 * 16 * 8192 * 8 / bytes_per_s + 3 * constants.elementwise_launch_s)
    assert decode["attention"] == pytest.approx(expected_s)
