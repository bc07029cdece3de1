"""How sure a prediction is: the interval that held 90 % of left-out measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import HOST_LOG_SD, Calibration, Provenance, interval_keys
from cost_models.engine import EngineConfig

FloatArray = NDArray[np.float64]
Value = TypeVar("Value", float, FloatArray)

BORROWED_WIDENING = 2.5
"""Intervals are this much wider where operators are carried over from another GPU."""

UNCHECKED_WIDENING = 1.5
"""Intervals of percentiles are this much wider where only means were checked."""

MEMORY_METRICS: Mapping[str, float] = {
    "weight_bytes_per_gpu": 0.015,
    "kv_cache_bytes_per_gpu": 0.02,
    "kv_cache_tokens": 0.02,
    "max_sequences": 0.03,
    "cuda_graph_bytes_per_gpu": 0.45,
}
"""Counted, not timed, and the same on every GPU: half width, in log, of their intervals.

No error seen on TensorRT-LLM's and vLLM's logs was larger.
"""

RATES_ALIKE = ("output_tok_per_s_per_gpu", "output_tok_per_s", "request_per_s")
"""Rates that differ by constants of a run: the error of one is that of all."""

SAME_ERROR_AS: Mapping[str, tuple[str, ...]] = {
    "itl_ms": ("tpot_ms.mean",),
    "e2el_ms": ("tpot_ms.mean",),
    "goodput_request_per_s": RATES_ALIKE,
    "usd_per_million_output_tokens": RATES_ALIKE,
    "output_tokens_per_joule": RATES_ALIKE,
}
"""Metrics whose checked error stands for another's, the first that is known."""

RATES = frozenset({*RATES_ALIKE, "goodput_request_per_s"})
COST = "usd_per_million_output_tokens"

TABLE_BLOCK_TOKENS = 64
"""Block size at which the published attention tables of TensorRT-LLM were measured."""

UNKNOWN_BLOCK_EFFECT = 0.026
"""Half width, in log, of the time of decode attention for each doubling away from that.

As far as the interval of what vLLM's kernel shows reaches; TensorRT-LLM's has not been measured.
"""

TOLD_BY_ACCEPTANCE = frozenset(
    {
        "tpot_ms", "e2el_ms", "output_tok_per_s", "output_tok_per_s_per_gpu", "request_per_s",
        "goodput_request_per_s", "usd_per_million_output_tokens", "output_tokens_per_joule",
    }
)  # fmt: skip
"""Metrics that hang on how many tokens a step yields."""

NORMAL_Q95 = 1.645
"""Standard errors to either side that hold 90 % of a normal distribution."""

HOST_Q95 = math.exp(NORMAL_Q95 * HOST_LOG_SD)
"""Time over the middle host's that one of twenty exceeds."""

DEFAULT_LOG_ERROR = 0.25
"""Half width, in log, of the interval of a metric that no run has checked."""


NEAR_CAPACITY = 0.85
"""Share of the highest rate from which an open loop is near capacity.

Waits grow with 1 / (1 - share): from here on an error of 3 % in the time of a step moves them by
a fifth and more.
"""


def load_regime(protocol: str, utilisation: float) -> str:
    """Return the kind of load whose errors are alike: the protocol, and whether it saturates."""
    is_open = protocol == "open_loop"
    return "open_loop_near_capacity" if is_open and utilisation >= NEAR_CAPACITY else protocol


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Uncertainty:
    """What past residuals do not hold, in log over the value; added to them in quadrature.

    Each may be an array: one value for each of many configurations.
    """

    chance: float = 0.0
    """Standard error, as that of a simulated percentile."""
    below: float | FloatArray = 0.0
    """How far the value falls at the fast end of 90 % of the hosts that it may run on."""
    above: float | FloatArray = 0.0
    """How far it rises at the other."""


def interval_90(
    name: str,
    value: Value,
    calibration: Calibration,
    provenance: Provenance,
    *,
    regime: str = "",
    doubt: Uncertainty = Uncertainty(),
) -> tuple[Value, Value]:
    """Return the interval that held 90 % of cross-validated measurements of this metric.

    Those under the same kind of load, where there are enough. A statistic that no run has
    checked takes its metric's mean, wider. On another machine than the runs' it is not known to
    which side its residuals lean: both take the larger.

    Args:
        name: Metric.
        value: Its prediction, or one for each of many configurations.
        calibration: Whose residuals are known.
        provenance: Whether the operators are the GPU's own.
        regime: Kind of load, as `load_regime` names it.
        doubt: What else may move it; its arrays are of the value's shape.
    """
    low, high = (abs(side) for side in _log_interval(name, calibration, regime))
    if name not in MEMORY_METRICS:
        if calibration.borrows_host:
            low = high = max(low, high)
        if provenance is Provenance.DATASHEET:
            low, high = low * BORROWED_WIDENING, high * BORROWED_WIDENING
    chance = NORMAL_Q95 * doubt.chance
    below: Any = np.sqrt(low**2 + chance**2 + doubt.below**2)
    above: Any = np.sqrt(high**2 + chance**2 + doubt.above**2)
    return value * np.exp(-below), value * np.exp(above)


def upper_end(value: Value, high: Value, risk: float) -> Value:
    """Return the upper end of the interval that holds 1 - risk.

    The 90 % interval is known; others keep its shape and scale like a normal distribution's.

    Args:
        value: Prediction.
        high: Upper end of its 90 % interval.
        risk: Share of measurements outside, above and below together; 0 asks for the value itself.
    """
    if not risk:
        return value
    reach: float = NormalDist().inv_cdf(1 - risk / 2) / NORMAL_Q95
    ratio: Value = (high / value) ** reach
    return value * ratio


def probability_within(limit: float, value: float, interval: tuple[float, float]) -> float:
    """Return the probability that a metric keeps an upper limit.

    Its logarithm is normal to either side of the prediction, each side as wide as the interval
    shows: the quantiles of 5, 50 and 95 % are joined as a normal distribution joins them. So a
    limit holds at a risk r, as `upper_end` has it, just where its probability is 1 - r / 2 or more.

    Args:
        limit: Above 0.
        value: Prediction, in the limit's unit.
        interval: Of 90 %.
    """
    if value <= 0:
        return 1.0
    if not math.isfinite(value):
        return 0.0
    reach = abs(math.log((interval[1] if limit >= value else interval[0]) / value))
    distance = math.log(limit / value)
    return NormalDist().cdf(NORMAL_Q95 * distance / reach) if reach else float(distance >= 0)


def probability_of_all(probabilities: Iterable[float]) -> float:
    """Return the probability that every limit holds: that of the least likely.

    A machine slower than predicted breaks them together. Of events that rise and fall together
    (comonotone) all hold as often as the rarest; the upper bound of Frechet and Hoeffding for any
    others (Nelsen, An Introduction to Copulas, 2006, section 2.5). 1 without a limit.
    """
    return min(probabilities, default=1.0)


def within_arrivals(
    name: str, value: float, interval: tuple[float, float], *, room: float, least: float
) -> tuple[float, float]:
    """Return an interval that ends where everything is served that comes.

    Args:
        name: Metric.
        value: Its prediction.
        interval: What residuals and doubts make of it.
        room: Requests that come over those that are served; infinite in a closed loop.
        least: Share of the predicted rate that a slow machine serves too, as `least_served` has
            it; 0 where that is not known.
    """
    low, high = interval
    if name in RATES:
        high = min(high, room * value)
    if name in RATES_ALIKE:
        low = max(low, least * value)
    if name == COST:
        low = max(low, value / room)
        high = min(high, value / least) if least else high
    return low, high


def least_served(*, room: float, capacity: float, latency: float) -> float:
    """Return the rate at the low end of an open loop's interval, over the predicted rate.

    As many are served as come, or as the machine can: a rate that rises with the capacity has
    its quantiles at the capacity's. Where even the low end of the capacity suffices, a run lasts
    as long as its requests take to arrive and the last ones to be answered.

    Args:
        room: Rate of the arrivals over the predicted rate, 1 or more: what the last answers add
            to the run's time.
        capacity: Low end of the capacity over the rate of the arrivals.
        latency: Upper end of a request's latency over the prediction.
    """
    return min(capacity, 1.0) * room / (1.0 + (room - 1.0) * latency)


def host_uncertainties(
    values: Mapping[str, Value], *ends: Mapping[str, Value]
) -> dict[str, Uncertainty]:
    """Return what a borrowed host's speed leaves open, metric by metric.

    The prior of the host's speed is carried through the prediction: near capacity, where a slower
    host makes a queue, it opens far more than in a closed loop that the GPU bounds.

    Args:
        values: Predicted with the borrowed constants.
        ends: The same at the ends of 90 % of the hosts, `HOST_Q95` faster and slower; of one
            shape. A value that is 0 at an end tells nothing.
    """
    doubts = {}
    for name, value in values.items():
        moves = [_log_ratio(found[name], value) for found in ends]
        if moves and name not in MEMORY_METRICS:
            below, above = (np.max([sign * m for m in moves], axis=0) for sign in (-1, 1))
            doubts[name] = Uncertainty(below=np.maximum(below, 0.0), above=np.maximum(above, 0.0))
    return doubts


def _log_ratio(value: Value, base: Value) -> FloatArray:
    """Return the logarithm of a ratio; 0 where either is not a positive number."""
    pair = np.asarray(np.broadcast_arrays(value, base), dtype=np.float64)
    known = np.isfinite(pair).all(axis=0) & (pair > 0).all(axis=0)
    top, bottom = np.log(np.where(known, pair, 1.0))
    return np.asarray(top - bottom)


def block_size_error(
    name: str, config: EngineConfig, calibration: Calibration, *, attention_share: float
) -> float:
    """Return the standard error over the value that an unmeasured block size brings.

    Args:
        name: Metric.
        config: Whose `tokens_per_block` may not be that of the tables.
        calibration: Whether its runs tell the effect of block sizes.
        attention_share: Of decode attention in a decode step.
    """
    untimed = name in MEMORY_METRICS or name.startswith("ttft_ms")
    if calibration.traits.knows_block_size_effect or untimed:
        return 0.0
    doublings = abs(math.log2(config.tokens_per_block / TABLE_BLOCK_TOKENS))
    return UNKNOWN_BLOCK_EFFECT * doublings * attention_share / NORMAL_Q95


def _log_interval(name: str, calibration: Calibration, regime: str) -> tuple[float, float]:
    if name in MEMORY_METRICS:
        return -MEMORY_METRICS[name], MEMORY_METRICS[name]
    metric = name.split(".", maxsplit=1)[0]
    alike = RATES_ALIKE if name in RATES_ALIKE else ()
    for known, widening in (
        (name, 1.0),
        *((rate, 1.0) for rate in alike),
        (f"{metric}.mean", UNCHECKED_WIDENING),
        *((other, UNCHECKED_WIDENING) for other in SAME_ERROR_AS.get(metric, ())),
    ):
        for key in interval_keys(known, regime):
            if key in calibration.intervals:
                quantiles = calibration.intervals[key]
                ends = quantiles.log_q05 * widening, quantiles.log_q95 * widening
                # Cost is one over a rate: what is cheap for one is fast for the other.
                return (-ends[1], -ends[0]) if name == COST else ends
    return -DEFAULT_LOG_ERROR, DEFAULT_LOG_ERROR
