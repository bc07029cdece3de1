"""Laws that no configuration may break."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.engine import EngineConfig
from cost_models.kv_cache import kv_layout
from cost_models.memory import plan_memory
from cost_models.precision import KV_DTYPES, QUANTIZATIONS
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepBatch, StepModel
from cost_models.weights import weight_bytes
from engines.registry import load_calibration

H100 = load_gpu("h100")
CALIBRATION = load_calibration(H100)
MODEL = load_model("llama-3.1-8b")


def _step(**knobs: object) -> StepModel:
    config = EngineConfig(**knobs)  # type: ignore[arg-type]
    return StepModel(model=MODEL, config=config, gpu=H100, calibration=CALIBRATION)


@settings(max_examples=25)
@given(batch=st.integers(1, 512), kv_len=st.integers(16, 16_000), factor=st.floats(1.0, 4.0))
def test_more_bandwidth_is_never_slower(batch: int, kv_len: int, factor: float) -> None:
    work = StepBatch(decode_sequences=batch, decode_kv_len=kv_len)
    faster = replace(H100, hbm_bytes_per_s=H100.hbm_bytes_per_s * factor)
    slow = _step().seconds(work)
    fast = replace(_step(), gpu=faster).seconds(work)
    assert fast <= slow * (1 + 1e-9)


@settings(max_examples=40)
@given(batch=st.integers(1, 1024), kv_len=st.integers(16, 8_000))
def test_one_rank_sends_nothing(batch: int, kv_len: int) -> None:
    cost = _step().cost(StepBatch(decode_sequences=batch, decode_kv_len=kv_len))
    assert np.all(cost.by_family.get("communication", np.zeros(())) == 0)


@settings(max_examples=40)
@given(batch=st.integers(1, 256), kv_len=st.integers(64, 4_000), tokens=st.integers(1, 8_000))
def test_prefill_beside_decode_costs_more_than_decode(batch: int, kv_len: int, tokens: int) -> None:
    step = _step()
    decode = StepBatch(decode_sequences=batch, decode_kv_len=kv_len)
    mixed = replace(decode, prefill_sequences=1, prefill_tokens=tokens)
    assert step.seconds(mixed) > step.seconds(decode)


def test_a_batch_of_steps_costs_what_its_steps_cost() -> None:
    step = _step(tensor_parallel_size=2)
    sizes = np.array([1.0, 7.0, 64.0, 200.0])
    together = step.seconds(StepBatch(decode_sequences=sizes, decode_kv_len=1000))
    alone = [
        float(step.seconds(StepBatch(decode_sequences=size, decode_kv_len=1000)))
        for size in sizes.tolist()
    ]
    assert together == pytest.approx(alone)


def test_families_add_up_to_the_step() -> None:
    cost = _step().cost(StepBatch(decode_sequences=32, decode_kv_len=512))
    assert float(cost.seconds) == pytest.approx(sum(float(v) for v in cost.by_family.values()))


@given(fewer=st.sampled_from(sorted(QUANTIZATIONS)), more=st.sampled_from(sorted(QUANTIZATIONS)))
def test_fewer_bits_never_need_more_memory(fewer: str, more: str) -> None:
    a, b = QUANTIZATIONS[fewer], QUANTIZATIONS[more]
    if a.experts_only or b.experts_only or a.bits_per_weight + 0.1 >= b.bits_per_weight:
        return
    sizes = [weight_bytes(MODEL, EngineConfig(quantization=name)).total for name in (fewer, more)]
    assert sizes[0] < sizes[1]


@given(dtype=st.sampled_from(sorted(KV_DTYPES)), tokens=st.integers(1, 100_000))
def test_paged_never_takes_less_than_its_tokens(dtype: str, tokens: int) -> None:
    layout = kv_layout(MODEL, EngineConfig(kv_cache_dtype=dtype))
    used = layout.bytes_per_token * tokens
    paged = float(layout.sequence_bytes(tokens, 32))
    assert used <= paged < used + 32 * layout.bytes_per_token


@given(fraction=st.floats(0.1, 0.98), tokens=st.integers(512, 32_768))
def test_blocks_are_conserved(fraction: float, tokens: int) -> None:
    config = EngineConfig(
        free_gpu_memory_fraction=fraction, max_num_tokens=tokens, max_seq_len=8192
    )
    memory = plan_memory(
        MODEL, config, gpu=H100, engine=CALIBRATION.traits, constants=CALIBRATION.memory
    )
    assert memory.kv_cache_tokens == memory.kv_cache_blocks * config.tokens_per_block
    per_block = memory.layout.bytes_per_token * config.tokens_per_block
    assert float(memory.kv_cache_bytes_per_gpu) == pytest.approx(
        float(memory.kv_cache_blocks) * per_block
    )
