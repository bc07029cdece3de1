"""How slow a machine's host is beside the one on which an engine's constants were fitted.

Launching kernels, scheduling, and streaming tokens to clients is Python that one core runs, so a
slower core (or one that others share) stretches all of it alike and leaves the GPU's part as it
is. One number then tells most of what sets one machine apart from another with the same engine,
and a few runs are enough to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import Calibration
from planner.calibration.fit import calibrated, misses
from planner.calibration.solver import solve_costly
from planner.measuring.runs import MeasuredRun

FloatArray = NDArray[np.float64]

STEP_WORK = (
    "host_s", "host_per_sequence_s", "host_floor_s", "host_floor_per_sequence_s", "eager_layer_s",
    "eager_layer_tp_s", "eager_sequence_s", "eager_layer_fp8_cache_s", "piecewise_layer_s",
    "piecewise_decode_layer_s", "synchronous_host_s", "synchronous_host_per_sequence_s",
    "draft_pass_s", "draft_layer_s",
)  # fmt: skip
"""Constants of a step that the host's speed stretches."""

FRONT_END_WORK = (
    "request_s", "prompt_token_s", "active_stream_s", "first_token_s", "streamed_token_s",
    "streamed_chunk_s",
)  # fmt: skip
"""Those of the front end."""

LOG_SD = 0.4
"""How far hosts differ before any run is seen, as a share."""

BOUNDS = (0.3, 4.0)

STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFit:
    """The slowness of a host, 1 where it is as fast as that of the engine's constants."""

    slowness: float
    relative_error: float

    def line(self) -> str:
        """Say it with its error."""
        return (
            f"the host takes {self.slowness:.2f} times as long as that of the shipped constants, "
            f"+- {100 * self.relative_error:.0f} %"
        )


def on_host(calibration: Calibration, slowness: float) -> Calibration:
    """Return a calibration whose host takes so many times as long for all that it does."""
    step, front_end = calibration.step, calibration.front_end
    return replace(
        calibration,
        step=replace(step, **{name: slowness * getattr(step, name) for name in STEP_WORK}),
        front_end=replace(
            front_end, **{name: slowness * getattr(front_end, name) for name in FRONT_END_WORK}
        ),
    )


def fit_host(runs: Sequence[MeasuredRun]) -> HostFit:
    """Return the slowness that brings whole simulated runs nearest to the measured ones.

    Args:
        runs: Of one engine on one machine; everything but its host is taken as it is known.
    """
    known = [calibrated(run, {}) for run in runs]

    def residuals(z: FloatArray) -> FloatArray:
        slowness = float(np.exp(LOG_SD * z[0]))
        missed = [
            misses(run, on_host(calibration, slowness))
            for run, calibration in zip(runs, known, strict=True)
        ]
        return np.array([*np.concatenate(missed), z[0]])

    low, high = np.log(BOUNDS) / LOG_SD
    fit = solve_costly(
        residuals, np.zeros(1), bounds=(np.array([low]), np.array([high])), steps=STEPS
    )
    error = LOG_SD / float(np.sqrt((fit.jac**2).sum()))
    return HostFit(slowness=float(np.exp(LOG_SD * fit.x[0])), relative_error=error)
