"""More work never takes less time, in tables and beyond: no simulation runs backwards."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.question import load_problem
from planner.simulator import StepClock
from planner.simulator.clock import MixedStep

GPUS = ("a100", "h100", "h200", "b200", "l40s")
MODELS = ("llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3")
QUANTIZATIONS = ("bf16", "fp8", "nvfp4")

STEP = 1 - 1e-9
"""Rounding of the tables."""

BATCHES_APART = 0.05
"""Share by which a batch may be cheaper than one far below it, whose kernels are others."""

limited = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def clock_of(
    gpu: str, model: str, quantization: str, tp: int, limits: tuple[int, int, int]
) -> StepClock | None:
    """The step costs of a configuration; None where the GPU has no such arithmetic."""
    problem = load_problem(gpu=gpu, workload="chat", model=model)
    batch, tokens, longest = limits
    config = replace(
        problem.default_config,
        quantization=quantization,
        tensor_parallel_size=tp,
        max_batch_size=batch,
        max_num_tokens=tokens,
        max_seq_len=longest,
        cuda_graph_max_batch_size=batch,
    )
    if problem.rules.violations(config, model=problem.model, gpu=problem.gpu):
        return None
    step = problem.evaluator.step_model(config)
    return StepClock(step, max_batch_size=batch, max_num_tokens=tokens, max_seq_len=longest)


@st.composite
def clocks(draw: st.DrawFn) -> tuple[StepClock, tuple[int, int, int]]:
    limits = (
        draw(st.sampled_from([8, 64, 200, 512])),
        draw(st.sampled_from([512, 2048, 8192])),
        draw(st.sampled_from([128, 384, 512, 640, 4096, 32768])),
    )
    names = draw(st.sampled_from(GPUS)), draw(st.sampled_from(MODELS))
    clock = clock_of(
        *names, draw(st.sampled_from(QUANTIZATIONS)), draw(st.sampled_from([1, 4])), limits
    )
    assume(clock is not None)
    assert clock is not None
    return clock, limits


@limited
@given(clocks(), st.data())
def test_decode_steps_take_time_and_no_less_with_more_work(  # type: ignore[no-untyped-def]
    made, data
) -> None:
    clock, (batch, _, longest) = made
    sequences = data.draw(st.integers(1, batch))
    kv_len = data.draw(st.integers(1, 2 * longest))
    steps = data.draw(st.integers(1, 4 * longest))
    span = clock.decode_span(sequences, kv_len)
    one, many = span.seconds(1), span.seconds(steps)
    assert one > 0
    assert many >= steps * one * STEP
    assert clock.decode_span(sequences, kv_len + steps).seconds(1) >= one * STEP
    larger = data.draw(st.integers(sequences, batch))
    assert clock.decode_span(larger, kv_len).seconds(1) >= one * (1 - BATCHES_APART)


@limited
@given(clocks(), st.data())
def test_waiting_for_an_event_ends(made, data) -> None:  # type: ignore[no-untyped-def]
    clock, (batch, _, longest) = made
    span = clock.decode_span(data.draw(st.integers(1, batch)), data.draw(st.integers(1, longest)))
    most = data.draw(st.integers(1, 1 << 20))
    wait_s = data.draw(st.floats(0, 1e6))
    steps = span.steps_until(wait_s, most)
    assert 0 <= steps <= most
    if 0 < steps < most:
        assert span.seconds(steps) >= wait_s
        assert steps == 1 or span.seconds(steps - 1) < wait_s


@limited
@given(clocks(), st.data())
def test_steps_with_prompts_take_no_less_with_more_of_them(made, data) -> None:  # type: ignore[no-untyped-def]
    clock, (batch, most_tokens, longest) = made
    decoding = data.draw(st.integers(0, batch - 1))
    prompts = data.draw(st.integers(1, min(batch - decoding, 16)))
    tokens = data.draw(st.integers(prompts, most_tokens))
    past = data.draw(st.integers(0, longest))
    kv_len = data.draw(st.integers(1, longest))

    def seconds(more_tokens: int = 0, more_past: int = 0, more_kv: int = 0) -> float:
        asked = tokens + more_tokens
        attended = asked * (past + more_past + asked / prompts / 2)
        step = MixedStep(decoding, float(kv_len + more_kv), prompts, asked, attended)
        return float(clock.mixed(step).seconds)

    least = seconds()
    assert least > 0
    assert seconds(more_tokens=data.draw(st.integers(1, most_tokens))) >= least * STEP
    assert seconds(more_past=data.draw(st.integers(1, longest))) >= least * STEP
    assert seconds(more_kv=data.draw(st.integers(1, longest))) >= least * STEP
