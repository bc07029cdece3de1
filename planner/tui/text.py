"""How numbers and configurations read on screen: ms, GiB, thousands parted by commas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cost_models.units import GIB

if TYPE_CHECKING:
    from cost_models.deployment import Deployment
    from planner.prediction.predict import Prediction


def number(value: float) -> str:
    """Return about four significant digits without an exponent where one can do without."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def bound(value: float) -> str:
    """Return a bound of an interval: three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def milliseconds(value: float) -> str:
    """Return a time in ms: one decimal below 1000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def in_short(prediction: Prediction) -> str:
    """Return whether a configuration is feasible, and the figures that say so, in one line."""
    if not prediction.fits:
        return f"✗ does not fit: {gib(float(prediction.memory.shortfall_bytes))} short"
    ttft, tpot = (milliseconds(prediction.value(f"{name}_ms.p99")) for name in ("ttft", "tpot"))
    sign = "✓" if prediction.feasible else "✗"
    rate = prediction.highest_rate_per_s
    end = f"≤ {bound(rate)} req/s" if rate > 0 else "over the SLO"
    return f"{sign} P99 TTFT {ttft} TPOT {tpot} ms, {end}"


def gib(size_bytes: float) -> str:
    """Return bytes in GiB."""
    return f"{size_bytes / GIB:,.2f} GiB"


def short_deployment(deployment: Deployment) -> str:
    """Return how a deployment splits and stores the model, and its limits, in one line."""
    config = deployment.config
    limits = f"batch {config.max_batch_size} tokens {config.max_num_tokens}"
    return f"{short_split(deployment)} {limits}"


def short_split(deployment: Deployment) -> str:
    """Return how a deployment splits and stores the model, and in how many servers."""
    config = deployment.config
    parts = [
        config.quantization, f"KV {config.kv_cache_dtype}", f"TP{config.tensor_parallel_size}",
        *([f"PP{config.pipeline_parallel_size}"] if config.pipeline_parallel_size > 1 else []),
        *([f"EP{config.moe_expert_parallel_size}"] if config.moe_expert_parallel_size > 1 else []),
        *(["attention DP"] if config.enable_attention_dp else []),
        *([f"×{deployment.num_servers}"] if deployment.num_servers > 1 else []),
    ]  # fmt: skip
    return " ".join(parts)
