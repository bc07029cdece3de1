"""Graphs of steps with prompts, piece by piece: faster to launch, padded to captured sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepBatch, StepModel
from engines.registry import find_engine, load_calibration

GPU, MODEL = load_gpu("h100"), load_model("llama-3.1-8b")
CONFIG = EngineConfig(tensor_parallel_size=4)


def step(*, pieces: bool) -> StepModel:
    return StepModel(
        model=MODEL,
        config=replace(CONFIG, enable_piecewise_cuda_graph=pieces),
        gpu=GPU,
        calibration=load_calibration(GPU, "trtllm"),
    )


def prompt(tokens: float, decoding: float = 0.0) -> StepBatch:
    return StepBatch(
        decode_sequences=decoding,
        decode_kv_len=500.0,
        prefill_sequences=1,
        prefill_tokens=tokens,
    )


def test_a_step_with_prompts_is_padded_to_what_was_captured() -> None:
    cost = step(pieces=True).cost
    padded, captured = cost(prompt(300.0)), cost(prompt(512.0))
    for family in ("gemm", "elementwise", "communication"):
        assert padded.by_family[family] == pytest.approx(captured.by_family[family])
    assert padded.by_family["attention_prefill"] < captured.by_family["attention_prefill"]
    # Decoding sequences count: 250 tokens and 10 of theirs do not fit into 256.
    beside = cost(prompt(250.0, decoding=10.0))
    assert beside.by_family["gemm"] == pytest.approx(captured.by_family["gemm"])


def test_its_launch_takes_a_share_of_the_time() -> None:
    eager, pieces = step(pieces=False), step(pieces=True)
    share = pieces.calibration.step.pieces_launch_share
    assert 0 < share < 1
    floors = pieces.launch_floor_s(0.0, np.array([100.0, 3072.0, 3073.0]))
    whole = eager.launch_floor_s(0.0, np.array([100.0, 3072.0, 3073.0]))
    assert floors == pytest.approx(whole * [share, share, 1.0])


@pytest.mark.parametrize(
    "batch", [prompt(5000.0), StepBatch(decode_sequences=17.0, decode_kv_len=500.0)]
)
def test_other_steps_are_as_before(batch: StepBatch) -> None:
    assert step(pieces=True).seconds(batch) == pytest.approx(step(pieces=False).seconds(batch))


def test_it_pays_where_launching_is_the_limit() -> None:
    short, ragged = prompt(128.0), prompt(2100.0)
    assert step(pieces=True).seconds(short) < 0.8 * step(pieces=False).seconds(short)
    assert (
        step(pieces=True).cost(ragged).by_family["gemm"]
        > (step(pieces=False).cost(ragged).by_family["gemm"])
    )


def test_it_is_not_combined_with_a_draft_model() -> None:
    config = EngineConfig(
        enable_piecewise_cuda_graph=True,
        decoding_type="DraftTarget",
        max_draft_len=3,
        speculative_model="draft",
    )
    found = find_engine("trtllm").rules.violations(config, model=MODEL, gpu=GPU)
    assert [violation.knob for violation in found] == ["enable_piecewise_cuda_graph"]
    ngram = replace(config, decoding_type="NGram", speculative_model="")
    assert not find_engine("trtllm").rules.violations(ngram, model=MODEL, gpu=GPU)
