"""Serving metrics in closed form, for thousands of configurations at once."""

from planner.estimator.curve import (
    ServingCurve,
    decode_steps,
    mean_kv_len,
    mixed_batch,
    serving_curve,
)
from planner.estimator.estimate import Estimate, Servers, estimate

__all__ = [
    "Estimate",
    "Servers",
    "ServingCurve",
    "decode_steps",
    "estimate",
    "mean_kv_len",
    "mixed_batch",
    "serving_curve",
]
