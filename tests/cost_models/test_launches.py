"""What launching a step costs: whole graphs, graphs piece by piece, and steps without graphs."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.calibration_io import load_calibration
from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepModel

SEQUENCES = 8.0
IN_PIECES, EAGER = 200.0, 2000.0
"""Prompt tokens of a step that vLLM replays piece by piece, and of one too long for that."""


def floor_s(kv_cache_dtype: str, prompt_tokens: float) -> float:
    gpu = load_gpu("h200")
    config = EngineConfig(
        quantization="bf16", kv_cache_dtype=kv_cache_dtype, max_batch_size=256,
        cuda_graph_max_batch_size=512, cuda_graph_padding=True,
    )  # fmt: skip
    calibration = load_calibration(gpu, "vllm")
    model = StepModel(
        model=load_model("llama-3.1-8b"), config=config, gpu=gpu, calibration=calibration
    )
    return float(np.asarray(model.launch_floor_s(SEQUENCES, prompt_tokens)))


def test_an_fp8_cache_costs_launches_only_where_no_piece_holds_them() -> None:
    assert floor_s("fp8", IN_PIECES) == floor_s("bf16", IN_PIECES)
    step = load_calibration(load_gpu("h200"), "vllm").step
    added_s = floor_s("fp8", EAGER) - floor_s("bf16", EAGER)
    assert added_s == pytest.approx(32 * step.eager_layer_fp8_cache_s)
    assert added_s > 0


def test_a_whole_graph_costs_least() -> None:
    assert 0 <= floor_s("bf16", 0.0) < min(floor_s("bf16", IN_PIECES), floor_s("bf16", EAGER))
