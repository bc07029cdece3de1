"""What observations add up to."""

from __future__ import annotations

from executor.machine import GpuSample
from executor.observe import LoadSeen, Observation
from planner.tui.live import Live, percentiles


def test_rates_are_those_of_the_last_seconds() -> None:
    live = Live()
    for second in range(1, 11):
        tokens = 10 * second if second <= 5 else 50 + 100 * (second - 5)
        live.add(_seen(at_s=float(second), num_tokens=tokens, num_ended=second))
    assert live.tokens_per_s == 100
    assert live.requests_per_s == 1
    assert len(live.rates) == 10


def test_a_new_load_begins_anew() -> None:
    live = Live()
    live.add(_seen(at_s=5.0, num_tokens=500, ttft_s=(1.0,)))
    live.add(Observation(phase="run 2", left_s=1.0))
    live.add(_seen(at_s=0.5, num_tokens=5, ttft_s=(0.1,)))
    assert list(live.ttft_s) == [0.1]
    assert live.tokens_per_s == 10


def test_a_gpu_that_vanishes_is_noticed() -> None:
    live = Live()
    here = GpuSample(memory_used_bytes=1e9, power_w=300.0)
    live.add(Observation(phase="run 1", left_s=1.0, gpus=(here, here)))
    assert not live.lost_gpus
    live.add(Observation(phase="run 1", left_s=1.0, gpus=(here, GpuSample())))
    assert list(live.lost_gpus) == [1]
    live.add(Observation(phase="run 1", left_s=1.0))
    assert list(live.lost_gpus) == [0, 1]


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles([3.0, 1.0, 2.0]) == (2.0, 3.0)


def _seen(
    *, at_s: float, num_tokens: int, num_ended: int = 0, ttft_s: tuple[float, ...] = ()
) -> Observation:
    load = LoadSeen(
        at_s=at_s, num_prompts=9, num_sent=9, num_ended=num_ended, num_tokens=num_tokens,
        ttft_s=ttft_s,
    )  # fmt: skip
    return Observation(phase="run", left_s=60.0, load=load)
