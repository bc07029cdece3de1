"""What further GPUs would buy: the best deployment of each larger size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import config_to_json
from planner.search.objective import handicapped, score
from planner.search.space import SearchSpace

LEAST_GAIN = 0.005
"""Of the objective, for which another GPU is worth a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthStep:
    """A deployment that takes more GPUs than the recommended one, and what that buys."""

    deployment: Deployment
    highest_rate_per_s: float
    """Of the whole deployment, under the SLO."""
    ttft_p99_ms: float
    tpot_mean_ms: float
    usd_per_million_output_tokens: float
    """At the offered load."""

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "num_gpus": self.deployment.num_gpus,
            "num_servers": self.deployment.num_servers,
            "config": config_to_json(self.deployment),
            "highest_rate_per_s": round(self.highest_rate_per_s, 4),
            "ttft_ms.p99": round(self.ttft_p99_ms, 3),
            "tpot_ms.mean": round(self.tpot_mean_ms, 3),
            "usd_per_million_output_tokens": round(self.usd_per_million_output_tokens, 4),
        }


def growth_of(
    recommended: Deployment,
    configs: Sequence[EngineConfig],
    *,
    space: SearchSpace,
    evaluator: Evaluator,
    objective: str,
    rate_factor: float = 1.0,
) -> tuple[GrowthStep, ...]:
    """Return the best deployment of every size above the recommended one that is worth its GPUs.

    Args:
        recommended: Where growth begins.
        configs: Engine configurations to choose from, each with any number of servers.
        space: What may be deployed.
        evaluator: Model, GPU, calibration, load and SLO.
        objective: What decides between deployments of one size.
        rate_factor: Simulated over estimated highest rate of the recommendation.
    """
    if space.use_all:
        return ()
    by_size: dict[int, tuple[float, GrowthStep]] = {}
    for config in dict.fromkeys([recommended.config, *configs]):
        for size, value, step in _sizes(config, space, evaluator, objective, rate_factor):
            if size not in by_size or value > by_size[size][0]:
                by_size[size] = (value, step)
    steps, best = [], by_size.get(recommended.num_gpus, (-np.inf, None))[0]
    for size in sorted(size for size in by_size if size > recommended.num_gpus):
        value, step = by_size[size]
        if value > best + LEAST_GAIN * abs(best):
            best = value
            steps.append(step)
    return tuple(steps)


def _sizes(
    config: EngineConfig,
    space: SearchSpace,
    evaluator: Evaluator,
    objective: str,
    rate_factor: float,
) -> list[tuple[int, float, GrowthStep]]:
    """Return size, worth and step of each number of servers that keeps the SLO at the load."""
    rows = space.deployments(config)
    found = evaluator.evaluate(rows)
    usd_per_hour = evaluator.gpu.usd_per_hour
    total = score(objective, rows, found, load=evaluator.load, usd_per_hour=usd_per_hour)
    if objective == "throughput":
        total = total * rows.num_gpus
    value = handicapped(total, evaluator.quality_of(config))
    kept = np.ones(len(rows), dtype=bool) & (found.refused_share <= 0) & found.memory.fits
    for excess in found.slo_excess.values():
        kept &= excess <= 0
    usd = rows.num_gpus * usd_per_hour / 3600 / found.metrics["output_tok_per_s"] * 1e6
    return [
        (
            int(rows.num_gpus[row]),
            float(value[row]),
            GrowthStep(
                deployment=rows.deployment(row),
                highest_rate_per_s=float(found.highest_rate_per_s[row]) * rate_factor,
                ttft_p99_ms=float(found.metrics["ttft_ms.p99"][row]),
                tpot_mean_ms=float(found.metrics["tpot_ms.mean"][row]),
                usd_per_million_output_tokens=float(usd[row]),
            ),
        )
        for row in np.flatnonzero(kept).tolist()
    ]
