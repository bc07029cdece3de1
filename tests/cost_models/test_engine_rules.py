"""What can be deployed where: values read from TensorRT-LLM's documentation."""

from __future__ import annotations

from typing import Any

import pytest

from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from engines.registry import find_engine

RULES = find_engine("trtllm").rules


@pytest.mark.parametrize(
    ("gpu", "quantization", "deployable"),
    [
        ("a100", "fp8", False),
        ("l40s", "fp8", True),
        ("l40s", "fp8_block", False),
        ("h100", "fp8", True),
        ("h100", "nvfp4", False),
        ("h100", "w4a8_awq", True),
        ("b200", "nvfp4", True),
        ("a100", "w4a16_awq", True),
        ("h100", "int8_sq", False),
    ],
)
def test_precisions_by_gpu(gpu: str, quantization: str, deployable: bool) -> None:
    found = RULES.violations(
        EngineConfig(quantization=quantization),
        model=load_model("llama-3.1-8b"),
        gpu=load_gpu(gpu),
    )
    assert (not found) == deployable


@pytest.mark.parametrize(
    ("gpu", "model", "quantization", "backend"),
    [
        ("h200", "deepseek-r1", "fp8_block", "CUTLASS"),
        ("b200", "deepseek-r1", "fp8_block", "DEEPGEMM"),
        ("b200", "deepseek-r1", "nvfp4", "CUTLASS"),
        ("h200", "gpt-oss-120b", "w4a16_mxfp4", "TRITON"),
    ],
)
def test_expert_kernels_are_those_that_the_guides_name(
    gpu: str, model: str, quantization: str, backend: str
) -> None:
    spec, shape = load_gpu(gpu), load_model(model)
    assert RULES.moe_backend(quantization, spec) == backend
    config = EngineConfig(quantization=quantization, moe_backend=backend, tensor_parallel_size=8)
    assert not RULES.violations(config, model=shape, gpu=spec)
    wrong = EngineConfig(quantization=quantization, moe_backend="VANILLA", tensor_parallel_size=8)
    assert [v.knob for v in RULES.violations(wrong, model=shape, gpu=spec)] == ["moe_backend"]


def test_the_search_meets_every_documented_kernel() -> None:
    values = RULES.legal_values(
        "moe_backend", model=load_model("deepseek-r1"), gpu=load_gpu("b200")
    )
    assert {"CUTLASS", "DEEPGEMM", "TRTLLM"} <= set(values)
    dense = RULES.legal_values(
        "moe_backend", model=load_model("llama-3.1-8b"), gpu=load_gpu("b200")
    )
    assert dense == ("CUTLASS",)


@pytest.mark.parametrize(
    ("engine", "model", "knobs", "broken"),
    [
        ("trtllm", "llama-3.1-8b", {"decoding_type": "NGram"}, []),
        ("trtllm", "llama-3.1-8b", {"decoding_type": "Medusa"}, ["decoding_type"]),
        ("vllm", "llama-3.1-8b", {"decoding_type": "Medusa"}, ["speculative_model"]),
        ("trtllm", "llama-3.1-8b", {"decoding_type": "Eagle"}, ["speculative_model"]),
        ("trtllm", "llama-3.1-8b", {"decoding_type": "MTP"}, ["decoding_type"]),
        ("trtllm", "deepseek-v3", {"decoding_type": "MTP"}, []),
        (
            "trtllm",
            "deepseek-v3",
            {"decoding_type": "MTP", "pipeline_parallel_size": 2},
            ["pipeline_parallel_size"],
        ),
        ("trtllm", "llama-3.1-8b", {"decoding_type": "NGram", "pipeline_parallel_size": 2}, []),
        ("vllm", "llama-3.1-8b", {"decoding_type": "NGram", "max_draft_len": 0}, ["max_draft_len"]),
        ("trtllm", "llama-3.1-8b", {"max_draft_len": 3}, ["max_draft_len"]),
    ],
)  # fmt: skip
def test_who_may_draft(engine: str, model: str, knobs: dict[str, Any], broken: list[str]) -> None:
    spec, gpu = load_model(model), load_gpu("h200")
    base: dict[str, Any] = {
        **find_engine(engine).defaults,
        "quantization": spec.checkpoint_quantization,
        "max_draft_len": 2,
        "tokens_per_block": 64,
    }
    config = EngineConfig(**base | {"decoding_type": ""} | knobs)
    found = find_engine(engine).rules.violations(config, model=spec, gpu=gpu)
    assert [violation.knob for violation in found] == broken


def test_engines_spell_drafting_their_own_way() -> None:
    """TensorRT-LLM 1.2.1's llm_args.py, and vLLM 0.25.1's config/speculative.py."""
    spelled = {
        engine: {kind: rule.name for kind, rule in find_engine(engine).rules.speculation.items()}
        for engine in ("trtllm", "vllm")
    }
    assert spelled == {
        "trtllm": {
            "NGram": "NGram", "DraftTarget": "DraftTarget", "Eagle": "Eagle", "MTP": "MTP",
        },
        "vllm": {
            "NGram": "ngram", "DraftTarget": "draft_model", "Eagle": "eagle3", "MTP": "mtp",
            "Medusa": "medusa",
        },
    }  # fmt: skip
