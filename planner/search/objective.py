"""What makes one configuration better than another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.prediction.evaluator import Evaluation, Slice
from planner.quality import QualityLoss
from planner.workloads.load import ArrivalMode, Load

FloatArray = NDArray[np.float64]
Score = TypeVar("Score", float, FloatArray)

QUALITY_PRICE = 0.02
"""Share of the objective that 1 % of quality is worth.

A precision must gain it for every percent that it may lose, at the upper end of its interval:
near-lossless FP8 is taken for a gain of a few percent, four-bit weights only where they decide.
"""

RISK_OF_QUALITY = 0.1
"""The interval of 90 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deciding:
    """What decides between simulated or measured configurations of an objective."""

    metric: str
    """Of a prediction."""
    measured: str
    """Of a run: it knows no prices, and its rates are of all its GPUs."""
    sign: float
    """1 where more is better, -1 where less is."""
    is_per_gpu: bool = False
    """Whether a run's value is divided by its GPUs."""


DECIDING: Mapping[str, Deciding] = {
    "goodput": Deciding(metric="goodput_request_per_s", measured="goodput_request_per_s", sign=1.0),
    "throughput": Deciding(
        metric="output_tok_per_s_per_gpu", measured="output_tok_per_s", sign=1.0, is_per_gpu=True
    ),
    "latency": Deciding(metric="e2el_ms.mean", measured="e2el_ms.mean", sign=-1.0),
    # At a given load, tokens/s per GPU decide the cost.
    "cost": Deciding(
        metric="usd_per_million_output_tokens",
        measured="output_tok_per_s",
        sign=-1.0,
        is_per_gpu=True,
    ),
}

HEADROOM_WORTH = 0.01
"""Share of the cost that unlimited headroom is worth: it breaks ties."""


def score(
    name: str, rows: Slice, evaluation: Evaluation, *, load: Load, usd_per_hour: float
) -> FloatArray:
    """Return the objective of every row, larger is better, without the quality handicap.

    `goodput` is the highest request rate under the SLO, `throughput` the output tokens/s
    per GPU at that rate, `latency` the mean E2E latency at the given load, `cost` the
    USD per million output tokens at the given load; of equal costs, headroom decides.
    """
    metrics = evaluation.metrics
    gpus = rows.num_gpus.astype(np.float64)
    if name == "latency":
        return -metrics["e2el_ms.mean"]
    rate = evaluation.highest_rate_per_s
    if name == "cost":
        usd = gpus * usd_per_hour / 3600 / metrics["output_tok_per_s"] * 1e6
        headroom = rate / (rate + metrics["request_per_s"])
        return np.asarray(-usd * (1 - HEADROOM_WORTH * headroom), dtype=np.float64)
    if name == "goodput":
        return rate
    if load.protocol is not ArrivalMode.OPEN_LOOP:
        return metrics["output_tok_per_s_per_gpu"]
    return rate * load.osl.mean / gpus


def quality_handicap(loss: QualityLoss) -> float:
    """Return the share of the objective that precisions of some loss must gain."""
    return QUALITY_PRICE * max(loss.at_risk(RISK_OF_QUALITY), 0.0)


def handicapped(score: Score, loss: QualityLoss) -> Score:
    """Return a score, or an array of them, less what the precisions must gain before preferred."""
    return score - abs(score) * quality_handicap(loss)


def expected(score: float, probability: float) -> float:
    """Return a score as it counts where its SLO holds with some probability only.

    What is served outside the SLO is worth nothing. Of what is earned (a score above 0) so much
    is expected as the score times the probability; what is paid (one below 0) is paid for all and
    counts for the share that is of use: a token within the SLO costs the score over the
    probability. Scores at one probability keep their order.

    Args:
        score: Larger is better.
        probability: That the SLO holds.
    """
    if score >= 0:
        return score * probability
    return score / probability if probability > 0 else -math.inf


def weighted_gpus(num_gpus: float, loss: QualityLoss) -> float:
    """Return the GPUs of a deployment, more by what its precisions must gain before preferred.

    So four-bit weights that save one GPU of eight are not taken for that alone.
    """
    return num_gpus * (1.0 + quality_handicap(loss))
