"""A step model that a person can check by hand, and engines small enough to run full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.frontend import FrontEndConstants
from cost_models.step import StepBatch, StepCost
from planner.simulator import (
    Arrivals,
    EngineLimits,
    Requests,
    ServerModel,
    SimulationResult,
    StepClock,
    simulate,
)
from planner.simulator.block_pool import PoolShape

FloatArray = NDArray[np.float64]


class LinearStep:
    """Weights once, a little for each token and for each cached token read."""

    weights_s = 4e-3
    token_s = 2e-5
    cached_token_s = 4e-8
    pair_s = 1e-9
    floor_s = 0.0

    def cost(self, batch: StepBatch) -> StepCost:
        sequences, kv_len, prompts, tokens, past = (
            np.asarray(column, np.float64)
            for column in (
                batch.decode_sequences,
                batch.decode_kv_len,
                batch.prefill_sequences,
                batch.prefill_tokens,
                batch.prefill_past,
            )
        )
        chunk = tokens / np.maximum(prompts, 1.0)
        return StepCost(
            by_family={
                "gemm": self.weights_s + self.token_s * (sequences + tokens),
                "attention_decode": self.cached_token_s * sequences * kv_len,
                "attention_prefill": self.pair_s * tokens * (past + chunk / 2),
                "host": np.asarray(1e-4),
            }
        )

    def launch_floor_s(self, sequences: ArrayLike, prefill_tokens: ArrayLike) -> FloatArray:
        prefills = np.asarray(prefill_tokens) + np.zeros_like(sequences) > 0
        return np.where(prefills, self.floor_s, 0.0)

    def launch_s(self, gpu_s: float, floor_s: float) -> float:
        return max(floor_s - gpu_s, 0.0)


class SlowLaunch(LinearStep):
    """A host that takes longer to launch a prefill than the GPU takes to run a decode step."""

    floor_s = 0.03


CLOCK = StepClock(LinearStep(), max_batch_size=64, max_num_tokens=4096, max_seq_len=4096)
SLOW_LAUNCH_CLOCK = StepClock(
    SlowLaunch(), max_batch_size=64, max_num_tokens=4096, max_seq_len=4096
)
NO_FRONT_END = FrontEndConstants()


def engine_limits(**changes: Any) -> EngineLimits:
    """A roomy engine without chunks; `blocks` of 16 tokens."""
    pool = PoolShape(tokens_per_block=16, capacity=changes.pop("blocks", 10_000))
    given: dict[str, Any] = {
        "max_batch_size": 16,
        "max_num_tokens": 2048,
        "max_seq_len": 2048,
        "pool": pool,
    }
    return EngineLimits(**given | changes)


def requests_of(isl: Sequence[int], osl: Sequence[int], *, max_output_tokens: int = 0) -> Requests:
    return Requests.of(np.array(isl), np.array(osl), max_output_tokens=max_output_tokens)


def run(
    requests: Requests,
    arrivals: Arrivals,
    *,
    clock: StepClock = CLOCK,
    limits: EngineLimits | None = None,
    front_end: FrontEndConstants = NO_FRONT_END,
    exact: bool = False,
) -> SimulationResult:
    return simulate(
        requests,
        arrivals,
        ServerModel(clock=clock, limits=limits or engine_limits(), front_end=front_end),
        exact=exact,
    )
