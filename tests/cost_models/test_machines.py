"""A machine that is slower in all it does takes as many times as long for a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepBatch, StepModel
from engines.registry import load_calibration

DECODE = StepBatch(decode_sequences=40.0, decode_kv_len=900.0)
MIXED = replace(DECODE, prefill_sequences=2.0, prefill_tokens=1500.0)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
def test_a_slower_machine_scales_a_step(
    model: str, tensor_parallel_size: int, batch: StepBatch
) -> None:
    gpu = load_gpu("h200")
    calibration = load_calibration(gpu, "vllm")
    config = EngineConfig(
        quantization="bf16", kv_cache_dtype="fp8", tensor_parallel_size=tensor_parallel_size,
        cuda_graph_max_batch_size=512,
    )  # fmt: skip
    usual, slower = (
        StepModel(model=load_model(model), config=config, gpu=gpu, calibration=known).cost(batch)
        for known in (calibration, calibration.slower(1.3))
    )
    assert float(slower.seconds) == pytest.approx(1.3 * float(usual.seconds), rel=1e-9)
    for family, seconds in usual.by_family.items():
        assert float(slower.by_family[family]) == pytest.approx(1.3 * float(seconds), rel=1e-9)
