"""What the host takes to launch a step: never more in captured pieces, more on a slower host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.engine import EngineConfig
from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu, load_model
from cost_models.step import StepBatch, StepModel
from engines.registry import load_calibration
from engines.vllm.cuda_graphs import captured_batch_sizes
from planner.calibration.constants import CONSTANTS, LAUNCHES, with_constants
from planner.prediction.evaluator import Evaluator
from planner.simulator.clock import MixedStep, StepClock
from planner.workloads.load import ArrivalMode, Lengths, Load

GPU, MODEL = load_gpu("h200"), load_model("llama-3.1-8b")
SHIPPED = load_calibration(GPU, "vllm")
CONFIG = EngineConfig(
    quantization="bf16", kv_cache_dtype="bf16", max_batch_size=256, max_num_tokens=2048,
    cuda_graph_max_batch_size=512,
)  # fmt: skip

LAUNCH_VALUES = st.fixed_dictionaries(
    {name: st.floats(CONSTANTS[name].low, CONSTANTS[name].high) for name in LAUNCHES}
)
"""All values that a fit may find."""

CONFIGS = st.builds(
    lambda batch, kv, tp: replace(
        CONFIG, max_batch_size=batch, kv_cache_dtype=kv, tensor_parallel_size=tp
    ),
    st.integers(1, 1024),
    st.sampled_from(["bf16", "fp8"]),
    st.sampled_from([1, 2]),
)


def step(values: Mapping[str, float], config: EngineConfig = CONFIG) -> StepModel:
    calibration = with_constants(SHIPPED, values)
    return StepModel(model=MODEL, config=config, gpu=GPU, calibration=calibration)


@given(LAUNCH_VALUES, CONFIGS, st.integers(0, 400), st.integers(1, 512))
def test_pieces_never_take_longer_to_launch_than_all_kernels(
    values: dict[str, float], config: EngineConfig, decoding: int, tokens: int
) -> None:
    captured = step(values, config)
    eager = step(values, replace(config, cuda_graph_max_batch_size=0))
    launched_s = captured.launch_floor_s(decoding, tokens)
    assert launched_s <= eager.launch_floor_s(decoding, tokens) * (1 + 1e-12)


@given(LAUNCH_VALUES, st.floats(1.01, 4.0), st.integers(0, 400), st.integers(1, 2048))
def test_a_slower_host_launches_slower(
    values: dict[str, float], factor: float, decoding: int, tokens: int
) -> None:
    usual = step(values)
    slower = replace(usual, calibration=usual.calibration.with_slower_host(factor))
    floors_s = [model.launch_floor_s(decoding, tokens) for model in (usual, slower)]
    assert floors_s[1] == pytest.approx(factor * floors_s[0])


@pytest.mark.parametrize("batch", [24, 64, 128, 256])
def test_steps_beyond_twice_the_batch_limit_are_not_captured(batch: int) -> None:
    """vLLM captures no more; how graphs cover the batch must not hide that from a prediction."""
    config = replace(CONFIG, max_batch_size=batch)
    load = Load(
        protocol=ArrivalMode.CLOSED_LOOP, isl=Lengths.fixed(512), osl=Lengths.fixed(128),
        concurrency=16,
    )  # fmt: skip
    evaluator = Evaluator(model=MODEL, gpu=GPU, calibration=SHIPPED, load=load, slo={})
    model = evaluator.step_model(config)
    largest = captured_batch_sizes(config)[-1]
    assert largest == min(2 * batch, 512)
    at_edge_s, behind_s = model.launch_floor_s(8.0, np.array([largest - 8.0, largest - 7.0]))
    share = SHIPPED.step.pieces_launch_share
    per_sequence_s = 8 * SHIPPED.step.eager_sequence_s
    assert at_edge_s - per_sequence_s == pytest.approx(share * (behind_s - per_sequence_s))


@given(
    LAUNCH_VALUES,
    st.lists(st.tuples(st.integers(0, 256), st.integers(1, 2048)), min_size=1, max_size=5),
)
def test_a_clock_with_other_launches_is_that_of_their_model(
    values: dict[str, float], steps: list[tuple[int, int]]
) -> None:
    limits = {"max_batch_size": 256, "max_num_tokens": 2048, "max_seq_len": 4096}
    model = step(values)
    relaunched = CLOCK.relaunched(model)
    fresh = StepClock(model, **limits)
    for decoding, tokens in steps:
        mixed = MixedStep(decoding, 800.0 if decoding else 0.0, 1, tokens, 0.5 * tokens**2)
        assert relaunched.mixed(mixed) == fresh.mixed(mixed)
        batch = StepBatch(
            decode_sequences=decoding, decode_kv_len=800.0, prefill_sequences=1,
            prefill_tokens=tokens,
        )  # fmt: skip
        floor_s = float(model.launch_floor_s(decoding, tokens))
        assert fresh.mixed(mixed).floor_s == pytest.approx(floor_s, rel=2e-3)
        assert fresh.mixed(mixed).seconds == pytest.approx(float(model.seconds(batch)), rel=0.02)


def test_constants_of_a_former_form_are_named(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text('{"schema_version": 1, "engine": "vllm", "step": {"piecewise_layer_s": 5e-4}}')
    with pytest.raises(ProfileError, match="piecewise_layer_s"):
        load_calibration(GPU, "vllm", [path])


CLOCK = StepClock(step({}), max_batch_size=256, max_num_tokens=2048, max_seq_len=4096)
CLOCK.mixed(MixedStep(8, 800.0, 1, 300, 4.5e4))
"""Its tables are made: others share them."""
