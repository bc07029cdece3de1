"""How sure a prediction is: the interval that held 90 % of left-out measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

from cost_models.calibration import Calibration, Provenance, interval_key
from cost_models.engine import EngineConfig

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

SAME_ERROR_AS: Mapping[str, str] = {
    "itl_ms": "tpot_ms.mean",
    "e2el_ms": "tpot_ms.mean",
    "output_tok_per_s": "output_tok_per_s_per_gpu",
    "request_per_s": "output_tok_per_s_per_gpu",
    "goodput_request_per_s": "output_tok_per_s_per_gpu",
    "usd_per_million_output_tokens": "output_tok_per_s_per_gpu",
    "output_tokens_per_joule": "output_tok_per_s_per_gpu",
}
"""Metric whose checked error stands for another's."""

TABLE_BLOCK_TOKENS = 64
"""Block size at which the published attention tables of TensorRT-LLM were measured."""

UNKNOWN_BLOCK_EFFECT = 0.026
"""Half width, in log, of the time of decode attention for each doubling away from that.

As far as the interval of what vLLM's kernel shows reaches; TensorRT-LLM's has not been measured.
"""

NORMAL_Q95 = 1.645
"""Standard errors to either side that hold 90 % of a normal distribution."""

DEFAULT_LOG_ERROR = 0.25
"""Half width, in log, of the interval of a metric that no run has checked."""


def interval_90(
    name: str,
    value: float,
    calibration: Calibration,
    provenance: Provenance,
    *,
    protocol: str = "",
    chance: float = 0.0,
) -> tuple[float, float]:
    """Return the interval that held 90 % of cross-validated measurements of this metric.

    Those under the same kind of load, where there are enough. A statistic that no run has
    checked takes its metric's mean, wider.

    Args:
        name: Metric.
        value: Its prediction.
        calibration: Whose residuals are known.
        protocol: How requests come.
        provenance: Whether the operators are the GPU's own.
        chance: Standard error over the value that past residuals do not hold, as that of a
            simulated percentile; added in quadrature.
    """
    low, high = _log_interval(name, calibration, protocol)
    if provenance is Provenance.DATASHEET and name not in MEMORY_METRICS:
        low, high = low * BORROWED_WIDENING, high * BORROWED_WIDENING
    low, high = (math.hypot(side, NORMAL_Q95 * chance) for side in (min(low, 0.0), max(high, 0.0)))
    return value * math.exp(-low), value * math.exp(high)


def block_size_error(
    name: str, config: EngineConfig, calibration: Calibration, *, attention_share: float
) -> float:
    """Return the standard error over the value that an unmeasured block size brings.

    Args:
        name: Metric.
        config: Whose `tokens_per_block` may not be that of the tables.
        calibration: Of which engine; vLLM's own runs tell its effect.
        attention_share: Of decode attention in a decode step.
    """
    untimed = name in MEMORY_METRICS or name.startswith("ttft_ms")
    if calibration.engine != "trtllm" or untimed:
        return 0.0
    doublings = abs(math.log2(config.tokens_per_block / TABLE_BLOCK_TOKENS))
    return UNKNOWN_BLOCK_EFFECT * doublings * attention_share / NORMAL_Q95


def _log_interval(name: str, calibration: Calibration, protocol: str) -> tuple[float, float]:
    if name in MEMORY_METRICS:
        return -MEMORY_METRICS[name], MEMORY_METRICS[name]
    metric = name.split(".", maxsplit=1)[0]
    for known, widening in (
        (name, 1.0),
        (f"{metric}.mean", UNCHECKED_WIDENING),
        (SAME_ERROR_AS.get(metric, ""), UNCHECKED_WIDENING),
    ):
        for key in (interval_key(known, protocol), interval_key(known)):
            if key in calibration.intervals:
                quantiles = calibration.intervals[key]
                return quantiles.log_q05 * widening, quantiles.log_q95 * widening
    return -DEFAULT_LOG_ERROR, DEFAULT_LOG_ERROR


def upper_factor(
    name: str, calibration: Calibration, provenance: Provenance, *, protocol: str, risk: float
) -> float:
    """Return the upper end of the interval that holds 1 - risk of the measurements, over the value.

    The 90 % interval is known; others keep its shape and scale like a normal distribution's.

    Args:
        name: Metric.
        calibration: Whose residuals are known.
        provenance: Whether the operators are the GPU's own.
        protocol: How requests come.
        risk: Share of measurements outside, above and below together; 0 asks for the value itself.
    """
    if not risk:
        return 1.0
    _, high = interval_90(name, 1.0, calibration, provenance, protocol=protocol)
    return float(high ** (NormalDist().inv_cdf(1 - risk / 2) / NORMAL_Q95))
