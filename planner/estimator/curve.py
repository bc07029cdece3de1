"""How one scheduler instance runs at every batch size: step times, TPOT, request rate.

An instance has a batch of its own: a server has one, or one for each attention-DP rank and each
of the micro-batches that fill a pipeline. The curve depends on the step model and the token
budget only, so all configurations that differ in other knobs share it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.engine import EngineConfig
from cost_models.speculation import AnyStep
from cost_models.step import StepBatch
from planner.simulator.curve_table import never_falling
from planner.workloads.load import ArrivalMode, Load

FloatArray = NDArray[np.float64]

BATCH_GRID = np.unique(np.geomspace(1, 4096, 56).round())
"""Decoding sequences at which the step is timed; between them the curve is interpolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCurve:
    """Steady state over the number of decoding sequences, one array element each."""

    decoding: FloatArray
    decode_step_s: FloatArray
    """A step in which every sequence decodes one token."""
    mixed_step_s: FloatArray
    """A step that prefills prompts beside."""
    mixed_share: FloatArray
    """Share of the steps that prefill, on this instance or on one that keeps step with it."""
    prompts_per_mixed_step: FloatArray
    chunks_per_prompt: FloatArray
    """Mixed steps that one prompt takes."""
    tpot_s: FloatArray
    """Mean step: the time between two tokens of a sequence."""
    rate_per_s: FloatArray
    """Requests that the instance completes."""

    def at(self, decoding: ArrayLike) -> ServingCurve:
        """Return the curve interpolated at other batch sizes."""
        return ServingCurve(**self._interpolated(decoding, *(f.name for f in fields(self))))

    def rate_at(self, decoding: ArrayLike) -> FloatArray:
        """Return `rate_per_s` alone, interpolated at other batch sizes."""
        return self._interpolated(decoding, "rate_per_s")["rate_per_s"]

    def tpot_at(self, decoding: ArrayLike) -> FloatArray:
        """Return `tpot_s` alone, interpolated at other batch sizes."""
        return self._interpolated(decoding, "tpot_s")["tpot_s"]

    def _interpolated(self, decoding: ArrayLike, *names: str) -> dict[str, FloatArray]:
        position = np.log(np.clip(decoding, self.decoding[0], self.decoding[-1]))
        grid = np.log(self.decoding)
        return {name: np.interp(position, grid, getattr(self, name)) for name in names}

    @property
    def step_wait_s(self) -> FloatArray:
        """Mean time until the running step ends, seen by a request that comes at random."""
        second_moment = (
            1 - self.mixed_share
        ) * self.decode_step_s**2 + self.mixed_share * self.mixed_step_s**2
        return second_moment / (2 * self.tpot_s)

    @property
    def prefill_s(self) -> FloatArray:
        """Time from the start of a prompt's first step to its first token."""
        return self.mixed_step_s * self.chunks_per_prompt


def decode_steps(step: AnyStep, load: Load) -> FloatArray:
    """Return the time of a pure decode step at every batch size of `BATCH_GRID`.

    A larger batch takes no less time (`planner.simulator.curve_table.never_falling`).
    """
    batch = StepBatch(decode_sequences=BATCH_GRID, decode_kv_len=mean_kv_len(load))
    return never_falling(step.seconds(batch))


def mean_kv_len(load: Load) -> float:
    """Cached tokens of a sequence, on average over its output."""
    return load.isl.mean + load.osl.mean / 2


def computed_prompt(load: Load) -> float:
    """Prompt tokens that are not found in the cache, on average."""
    return max(load.isl.mean - load.reusable_prefix_tokens, 1.0)


def mixed_batch(
    load: Load, *, decoding: FloatArray, prompts: FloatArray, prefilling: float | FloatArray = 1.0
) -> StepBatch:
    """Return a step that prefills `prompts` prompts, or a share of one, beside what decodes.

    `prefilling` is the share of the instances in step that do so in the same step.
    """
    prompt = computed_prompt(load)
    sequences = np.maximum(prompts, 1.0)
    tokens = prompts * prompt
    return StepBatch(
        decode_sequences=decoding,
        decode_kv_len=mean_kv_len(load),
        prefill_sequences=sequences,
        prefill_tokens=tokens,
        prefill_past=load.reusable_prefix_tokens + (prompt - tokens / sequences) / 2,
        rank_tokens=decoding + prefilling * tokens,
    )


def serving_curve(
    step: AnyStep,
    load: Load,
    *,
    decode_s: FloatArray,
    config: EngineConfig,
    lockstep: bool = False,
) -> ServingCurve:
    """Return an instance's steady state at every batch size of `BATCH_GRID`.

    With S sequences decoding, x = S/(osl − 1) requests end per step and as many prompts
    must be prefilled. A mixed step takes k of them, at least one and at most what
    `max_num_tokens` leaves, so the share of mixed steps is f = min(1, x/k) and
    TPOT = (1 − f)·t_decode + f·t_mixed. In a closed loop a client never meets its own
    prefill while it decodes, so f counts those of the S − 1 others. Where prompts come
    faster than steps can take them, prefill limits the rate and fewer sequences decode.

    Instances in step (attention-DP ranks, micro-batches of a pipeline) all wait for the one
    that prefills: of R instances at least one does in F = 1 − (1 − f)^R of the steps.

    Args:
        step: Step cost of the instance.
        load: What is served.
        decode_s: `decode_steps` of the same step model: it does not depend on the budget.
        config: Its token budget, whether it chunks prompts, and how many instances keep step.
        lockstep: Requests end and come back together, so a step takes as many prompts
            as it can hold, not only those that one step sets free.
    """
    decoding = BATCH_GRID
    prompt = computed_prompt(load)
    decode_tokens = max(load.osl.mean - 1, 0.5)
    budget = np.maximum(config.max_num_tokens - decoding * step.rows_per_sequence, 1.0)
    most = budget / prompt if config.enable_chunked_prefill else np.maximum(budget // prompt, 1.0)
    wanted = decoding / decode_tokens
    waiting = decoding if lockstep else np.ones_like(decoding)
    prompts = np.minimum(np.maximum(wanted, waiting), most)
    own_share = np.minimum(wanted / prompts, 1.0)
    chunks = np.maximum(1.0, np.ceil(prompt / budget)) if config.enable_chunked_prefill else 1.0
    closed = load.protocol is ArrivalMode.CLOSED_LOOP
    instances = config.num_instances
    met_share = own_share * (1 - 1 / decoding) if closed else own_share
    mixed_share = 1 - (1 - met_share) * (1 - own_share) ** (instances - 1)
    prefilling = own_share / (1 - (1 - own_share) ** instances)
    mixed_s = step.seconds(
        mixed_batch(load, decoding=decoding, prompts=prompts, prefilling=prefilling)
    )
    mixed_s = np.maximum(mixed_s, decode_s)
    tpot = (1 - mixed_share) * decode_s + mixed_share * mixed_s
    rate = np.minimum(decoding / (decode_tokens * tpot), prompts / mixed_s)
    return ServingCurve(
        decoding=decoding,
        decode_step_s=decode_s,
        mixed_step_s=mixed_s,
        mixed_share=mixed_share,
        prompts_per_mixed_step=prompts,
        chunks_per_prompt=np.broadcast_to(chunks, decoding.shape),
        tpot_s=tpot,
        rate_per_s=np.maximum.accumulate(rate),
    )
