"""The limits that trtllm-bench picks, worked out by hand from its published rule."""

from __future__ import annotations

import pytest

from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from cost_models.weights import parameter_count
from engines.trtllm.bench_limits import tuned_limits


@pytest.mark.parametrize(
    ("isl", "osl", "chunked", "batch", "tokens"),
    [
        # (85.52e9 - 2·8.03e9)·0.9/(131072·4096) = 116 sequences -> 128; 116·2 tokens -> 2048
        (2048, 2048, True, 128, 2048),
        # 476/256 -> 1024 by 128s: 1858 sequences -> by 256s 2048; 1858·2 = 3716 -> 3840
        (128, 128, True, 2048, 3840),
        # off: a prompt beside a full batch
        (8192, 1024, False, 64, 8192 + 64),
    ],
)
def test_rule(isl: int, osl: int, chunked: bool, batch: int, tokens: int) -> None:
    gpu, model = load_gpu("h100"), load_model("llama-3.1-8b")
    config = tuned_limits(
        EngineConfig(enable_chunked_prefill=chunked), model=model, gpu=gpu, isl=isl, osl=osl
    )
    assert (config.max_batch_size, config.max_num_tokens) == (batch, tokens)


def test_fp8_weights_and_cache_leave_room_for_more() -> None:
    gpu, model = load_gpu("h100"), load_model("llama-3.1-8b")
    assert parameter_count(model) == pytest.approx(8.03e9, rel=1e-3)
    fp8 = EngineConfig(quantization="fp8", kv_cache_dtype="fp8")
    plain, small = (
        tuned_limits(config, model=model, gpu=gpu, isl=1024, osl=1024)
        for config in (EngineConfig(), fp8)
    )
    assert small.max_batch_size > 2 * plain.max_batch_size * 0.9
