"""The constants that serving runs can tell: where each lives, its prior and its bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from cost_models.calibration import (
    HOST_FRONT_END_CONSTANTS,
    HOST_LOG_SD,
    HOST_STEP_CONSTANTS,
    Calibration,
)


class Part(StrEnum):
    """The part of a calibration that holds a constant."""

    STEP = "step"
    FRONT_END = "front_end"
    FAMILY_SCALE = "family_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One fitted constant; its logarithm is normal before any run is seen."""

    part: Part
    prior: float
    """Median before any run is seen; the same for every engine."""
    log_sd: float
    low: float
    high: float


def _step(prior: float, log_sd: float, low: float, high: float) -> Constant:
    return Constant(part=Part.STEP, prior=prior, log_sd=log_sd, low=low, high=high)


def _front_end(prior: float, log_sd: float, low: float, high: float) -> Constant:
    return Constant(part=Part.FRONT_END, prior=prior, log_sd=log_sd, low=low, high=high)


def _scale(log_sd: float) -> Constant:
    return Constant(part=Part.FAMILY_SCALE, prior=1.0, log_sd=log_sd, low=0.3, high=3.0)


CONSTANTS: Mapping[str, Constant] = {
    "host_s": _step(3e-4, 0.7, 2e-5, 5e-3),
    "host_per_sequence_s": _step(4.5e-6, 0.7, 5e-7, 5e-5),
    "layer_gap_s": _step(2e-6, 0.7, 1e-7, 3e-5),
    "tp_gap_s": _step(1e-6, 0.7, 1e-8, 5e-5),
    "eager_layer_s": _step(2e-4, 0.7, 1e-5, 2e-3),
    "eager_layer_tp_s": _step(3e-4, 0.7, 1e-5, 2e-3),
    "eager_sequence_s": _step(5e-5, 0.7, 1e-6, 3e-4),
    "eager_layer_fp8_cache_s": _step(3e-5, 1.0, 1e-6, 5e-4),
    "pieces_launch_share": _step(0.5, 0.4, 0.05, 1.0),
    "elementwise_efficiency": _step(0.8, 0.3, 0.3, 1.0),
    "elementwise_launch_s": _step(1.5e-6, 0.5, 2e-7, 5e-6),
    "attention_decode_efficiency": _step(0.88, 0.07, 0.3, 1.0),
    "attention_decode_fp8_bytes_per_flop": _step(3.6e-3, 0.2, 1e-3, 5e-3),
    "attention_decode_launch_s": _step(4e-6, 0.5, 1e-6, 3e-5),
    "attention_decode_fp8_launch_s": _step(8e-6, 0.7, 1e-6, 5e-5),
    "attention_decode_long_excess": _step(0.2, 1.0, 5e-3, 3.0),
    "attention_decode_fp8_long_excess": _step(0.5, 1.0, 5e-3, 5.0),
    "gemm_row_excess": _step(0.08, 0.7, 1e-3, 0.6),
    "fp8_gemm_row_excess": _step(0.12, 0.7, 1e-3, 1.0),
    "fp8_wide_gemm_s": _step(5e-6, 0.5, 5e-7, 3e-5),
    "host_floor_s": _step(2e-3, 0.5, 1e-4, 1e-2),
    "host_floor_per_sequence_s": _step(2e-5, 0.7, 1e-6, 2e-4),
    "synchronous_host_s": _step(3e-3, 0.7, 5e-5, 2e-2),
    "synchronous_host_per_sequence_s": _step(1e-4, 0.7, 5e-7, 1e-3),
    "draft_pass_s": _step(1e-3, 0.7, 1e-5, 1e-2),
    "draft_layer_s": _step(3e-4, 0.7, 1e-5, 2e-3),
    "drafting_layer_pass_s": _step(3e-4, 0.7, 1e-5, 2e-3),
    "piecewise_decode_layer_s": _step(3e-4, 0.5, 5e-6, 2e-3),
    "gemm": _scale(0.05),
    "attention_prefill": _scale(0.3),
    "moe": _scale(0.1),
    "request_s": _front_end(3.5e-3, 0.5, 2e-4, 5e-2),
    "prompt_token_s": _front_end(2e-6, 0.7, 1e-7, 2e-5),
    "active_stream_s": _front_end(2.5e-4, 0.5, 1e-5, 2e-3),
    "first_token_s": _front_end(1.6e-3, 0.5, 1e-4, 5e-2),
    "streamed_token_s": _front_end(3e-5, 0.5, 1e-6, 3e-4),
    "streamed_chunk_s": _front_end(3e-5, 0.5, 1e-6, 3e-4),
    "jitter_s": _front_end(2.5e-4, 0.7, 1e-5, 3e-3),
    "jitter_fraction": _front_end(0.03, 0.7, 2e-3, 0.2),
}
"""By name. Priors are round figures near what earlier studies of such runs found."""


LOOP: Mapping[str, Constant] = {
    "request_s": _front_end(3e-4, 0.7, 2e-5, 5e-3),
    "prompt_token_s": _front_end(8e-7, 0.5, 1e-8, 2e-5),
    "active_stream_s": _front_end(2e-4, 0.7, 1e-6, 2e-3),
    "first_token_s": _front_end(6e-3, 0.7, 1e-4, 5e-2),
    "streamed_token_s": _front_end(2.5e-5, 0.5, 1e-6, 3e-4),
    "streamed_chunk_s": _front_end(4e-5, 0.4, 1e-6, 3e-4),
}
"""Priors where requests pass the front end together: it works on all of them meanwhile, so what
one waits is no measure of what it costs."""


LAUNCHES = ("eager_layer_s", "eager_layer_fp8_cache_s", "eager_sequence_s", "pieces_launch_share")
"""Constants that steps seen by clients tell, but whole runs better: what hides a launch is what
the engine does meanwhile."""


KERNEL_LOG_SD = 0.1
"""How far constants of kernels differ between GPUs: their operators are each GPU's own."""


def shipped_priors(
    engine_file: Mapping[str, Any], values: Mapping[str, float] | None = None
) -> dict[str, Constant]:
    """Return priors for a machine that no run has shown: what others were found to be.

    Args:
        engine_file: A shipped file of constants, with their errors.
        values: Found constants, if other than the file's.
    """
    found = values or {**engine_file["step"], **engine_file["front_end"]}
    found = {**engine_file["step"]["family_scale"], **found}
    errors = engine_file.get("relative_errors", {})
    host = {*HOST_STEP_CONSTANTS, *HOST_FRONT_END_CONSTANTS}
    priors = {}
    for name, constant in fitted_constants(engine_file).items():
        between = HOST_LOG_SD if name in host else KERNEL_LOG_SD
        log_sd = min(math.hypot(errors.get(name, constant.log_sd), between), constant.log_sd)
        middle = min(max(float(found[name]), constant.low), constant.high)
        priors[name] = replace(constant, prior=middle, log_sd=log_sd)
    return priors


def fitted_constants(engine_file: Mapping[str, Any]) -> dict[str, Constant]:
    """Return the constants that an engine's form has: those its shipped file sets."""
    held = {
        Part.STEP: engine_file["step"],
        Part.FRONT_END: engine_file["front_end"],
        Part.FAMILY_SCALE: engine_file["step"]["family_scale"],
    }
    if not engine_file["step"]["piecewise_max_tokens"]:
        # No run of such an engine was replayed in pieces: nothing tells what of a launch stays.
        held[Part.STEP] = {**engine_file["step"], "pieces_launch_share": 0.0}
    loop = LOOP if engine_file["front_end"].get("accepts_together") else {}
    table = {**CONSTANTS, **loop}
    return {name: c for name, c in table.items() if held[c.part].get(name)}


def with_constants(
    calibration: Calibration, values: Mapping[str, float], *, kept: Iterable[str] = ()
) -> Calibration:
    """Return a calibration with other constants, but for those that are `kept` as they are."""
    by_part: dict[Part, dict[str, Any]] = {part: {} for part in Part}
    for name, value in values.items():
        if name not in kept:
            by_part[CONSTANTS[name].part][name] = value
    step = calibration.step
    scale = {**step.family_scale, **by_part[Part.FAMILY_SCALE]}
    return replace(
        calibration,
        step=replace(step, **by_part[Part.STEP], family_scale=scale),
        front_end=replace(calibration.front_end, **by_part[Part.FRONT_END]),
    )
