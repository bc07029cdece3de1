"""Drafting and verifying: what they cost, what they hold, and where they stop to pay."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from cost_models.acceptance import Acceptance
from cost_models.draft import draft_of
from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.memory import plan_memory
from cost_models.model import ModelSpec
from cost_models.profile_io import load_gpu, load_model
from cost_models.speculation import SpeculativeStep, speculation_of, speculative_step
from cost_models.step import StepBatch, StepModel
from engines.registry import load_calibration
from engines.vllm.cuda_graphs import captured_batch_sizes

GPU = load_gpu("h200")
MODEL = load_model("llama-3.1-8b")
SMALL = load_model("llama-3.2-1b")
LIKELY = Acceptance(conditional=(0.8, 0.7, 0.6))
BARE = EngineConfig(max_batch_size=256, cuda_graph_max_batch_size=256, cuda_graph_padding=True)


def step_of(
    kind: str,
    length: int = 3,
    *,
    acceptance: Acceptance = LIKELY,
    engine: str = "vllm",
    model: ModelSpec = MODEL,
) -> SpeculativeStep:
    config = replace(BARE, decoding_type=kind, max_draft_len=length, speculative_model="d")
    calibration = load_calibration(GPU, engine)
    speculation = speculation_of(
        config, model=model, engine=calibration.traits, acceptance=acceptance, draft_model=SMALL
    )
    return speculative_step(
        speculation, model=model, config=config, gpu=GPU, calibration=calibration
    )


def plain_step(engine: str = "vllm", model: ModelSpec = MODEL) -> StepModel:
    return StepModel(model=model, config=BARE, gpu=GPU, calibration=load_calibration(GPU, engine))


def decode(sequences: float) -> StepBatch:
    return StepBatch(decode_sequences=sequences, decode_kv_len=1000.0)


def mixed(sequences: float) -> StepBatch:
    return StepBatch(
        decode_sequences=sequences, decode_kv_len=1000.0, prefill_sequences=2, prefill_tokens=1500
    )


@pytest.mark.parametrize(
    ("kind", "engine"),
    [("NGram", "vllm"), ("DraftTarget", "trtllm"), ("Eagle", "vllm"), ("Medusa", "vllm")],
)
def test_the_gain_falls_with_the_batch_and_ends(kind: str, engine: str) -> None:
    """Verifying is free while weights are read anyway, and not where the GPU computes."""
    plain, step = plain_step(engine), step_of(kind, engine=engine)
    gains = [
        float(plain.seconds(decode(n)) / step.seconds(decode(n))) for n in (1, 16, 64, 128, 256)
    ]
    # Tiles and captured sizes make steps of their own.
    assert all(later < 1.03 * sooner for sooner, later in pairwise(gains))
    assert gains[0] > 1.25
    assert gains[-1] < 0.75 * gains[0]


def test_a_draft_model_loses_at_large_batches_where_it_wins_alone() -> None:
    plain, step = plain_step("trtllm"), step_of("DraftTarget", engine="trtllm")
    assert step.seconds(decode(1)) < plain.seconds(decode(1))
    assert step.seconds(decode(256)) > plain.seconds(decode(256))


def test_a_draft_model_that_is_launched_layer_by_layer_loses_even_alone() -> None:
    """Measured: docs/speculation, Llama-3.1-8B with a 1B draft under vLLM, 1 client."""
    plain, step = plain_step("vllm"), step_of("DraftTarget", engine="vllm")
    assert step.seconds(decode(1)) > 1.1 * plain.seconds(decode(1))


@pytest.mark.parametrize("engine", ["trtllm", "vllm"])
@pytest.mark.parametrize("kind", ["NGram", "DraftTarget", "Eagle"])
def test_tokens_cost_what_the_iterations_cost_that_yield_them(kind: str, engine: str) -> None:
    step = step_of(kind, engine=engine)
    tokens = step.speculation.tokens_per_step
    whole = step.iteration(decode(8)).seconds
    assert float(tokens * step.seconds(decode(8))) == pytest.approx(float(whole))
    beside = step.iteration(mixed(8)).seconds
    in_steps = step.seconds(mixed(8)) + (tokens - 1) * step.seconds(decode(8))
    assert float(in_steps) == pytest.approx(float(beside))


def test_more_acceptance_is_never_slower() -> None:
    times = [
        float(step_of("NGram", acceptance=Acceptance(conditional=(a,))).seconds(decode(32)))
        for a in (0.0, 0.2, 0.5, 0.9, 1.0)
    ]
    assert times == sorted(times, reverse=True)


def test_only_sequences_with_a_draft_verify_more_rows_in_vllm() -> None:
    rare = Acceptance(conditional=(0.8,), draft_rate=0.25, draft_tokens=2.0)
    assert step_of("NGram", acceptance=rare).verify.rows_per_sequence == 1.5
    # TensorRT-LLM pads drafts to the length for which its graphs are captured.
    padded = step_of("NGram", acceptance=rare, engine="trtllm").verify
    assert padded.rows_per_sequence == 4.0


def test_eagle_and_mtp_draft_with_one_layer() -> None:
    eagle = step_of("Eagle").draft
    assert eagle is not None
    assert eagle.model.num_layers == 1
    deepseek = load_model("deepseek-v3")
    config = replace(BARE, quantization="fp8_block", decoding_type="MTP", max_draft_len=1)
    mtp = draft_of(config, deepseek, None)
    assert mtp is not None
    # DeepSeek-V3 technical report: the MTP module has 11.5 billion parameters of its own.
    assert mtp.weight_bytes == pytest.approx(11.5e9, rel=0.03)


def test_the_draft_takes_weights_and_cache_on_the_same_gpu() -> None:
    config = replace(BARE, decoding_type="DraftTarget", max_draft_len=3, speculative_model="d")
    draft = draft_of(config, MODEL, SMALL)
    known = load_calibration(GPU, "vllm")
    engine, constants = known.traits, known.memory
    alone = plan_memory(MODEL, BARE, gpu=GPU, engine=engine, constants=constants)
    beside = plan_memory(MODEL, config, gpu=GPU, engine=engine, constants=constants, draft=draft)
    # 1,235,814,400 parameters in BF16, and 16 layers of 8 KV heads of 64.
    drafting = beside.weight_bytes_per_gpu - alone.weight_bytes_per_gpu
    assert drafting == pytest.approx(2 * 1_235_814_400, rel=1e-5)
    assert beside.layout.bytes_per_token - alone.layout.bytes_per_token == 32_768
    assert beside.kv_cache_tokens < alone.kv_cache_tokens
    for plan in (alone, beside):
        parts = (
            plan.weight_bytes_per_gpu + plan.kv_cache_bytes_per_gpu + plan.runtime_bytes_per_gpu
            + plan.activation_bytes_per_gpu + plan.communication_bytes_per_gpu
            + plan.reserved_bytes_per_gpu
        )  # fmt: skip
        assert float(parts) == pytest.approx(GPU.memory_bytes)


def test_medusa_heads_are_weights_without_a_cache() -> None:
    config = replace(BARE, decoding_type="Medusa", max_draft_len=3)
    heads = draft_of(config, MODEL, None)
    assert heads is not None
    # Three times a block of 4096 by 4096 and a matrix over 128,256 tokens, in BF16.
    assert heads.weight_bytes == 3 * 2 * 4096 * (4096 + 128_256)
    assert heads.kv_layout.bytes_per_token == 0


def test_a_draft_model_must_be_named() -> None:
    config = replace(BARE, decoding_type="DraftTarget", max_draft_len=3)
    with pytest.raises(ConfigError, match="DraftTarget") as caught:
        draft_of(config, MODEL, None)
    assert "speculative_model" in caught.value.hint


def test_vllm_captures_multiples_of_what_a_sequence_verifies() -> None:
    """`CompilationConfig.adjust_cudagraph_sizes_for_spec_decode`: 4, 8, 16, 24, … 512 tokens."""
    config = replace(BARE, decoding_type="NGram", max_draft_len=3, cuda_graph_max_batch_size=512)
    sizes = captured_batch_sizes(config)
    assert sizes[:5] == (1, 2, 4, 6, 8)
    assert sizes[-1] == 128


def test_searching_for_n_grams_grows_with_the_context() -> None:
    ngram, draft = step_of("NGram"), step_of("DraftTarget")
    short, long = (
        StepBatch(decode_sequences=64.0, decode_kv_len=length) for length in (1_000.0, 100_000.0)
    )
    token_s = ngram.verify.calibration.step.ngram_token_s
    assert token_s > 0
    grown_s = ngram.iteration(long).by_family["draft"] - ngram.iteration(short).by_family["draft"]
    assert grown_s == pytest.approx(64 * 99_000 * token_s)
    # A draft model reads its own cache; nothing is searched.
    assert draft.search_s(1e6) == 0
    assert step_of("NGram", engine="trtllm").search_s(1e6) == 0


def test_drafts_are_judged_over_the_whole_vocabulary() -> None:
    step = step_of("NGram")
    constants = step.verify.calibration.step
    bytes_per_s = GPU.hbm_bytes_per_s * constants.elementwise_efficiency
    read_bytes = 64 * 3 * MODEL.vocab_size * constants.judged_logit_bytes
    assert step.judging_s(64.0) == pytest.approx(read_bytes / bytes_per_s)
    assert step.judging_s(0.0) == 0
