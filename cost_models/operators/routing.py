"""How many experts a batch wakes and how many tokens reach the busiest rank.

Expert popularity is either balanced or drawn from a truncated power law, by the rule
with which the MoE tables were measured: draw one popularity for each expert, scale
their sum to tokens · top_k, round, let no expert exceed the number of tokens, and deal
what rounding left over to the least loaded experts, one rank after the other. The rank
with the most tokens is the one that counts, since the others wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

FEW_TOKENS_RANGE = (0.01, 2.0)
"""Popularities drawn while tokens · top_k does not exceed the number of experts."""

MANY_TOKENS_SHARE = 0.8
"""Beyond that, popularities are drawn between 1 and this share of the tokens."""

NUM_POPULARITIES = 8192
"""Popularities drawn in all: the fewer experts, the more draws the load is averaged over."""

TOKEN_KNOTS = np.array(
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384]
    + [step * 2**power for power in range(9, 18) for step in (1, 1.5)],
    dtype=np.float64,
)
"""Numbers of tokens at which the load is worked out; it is interpolated between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """What the busiest rank has to do, one value for each number of tokens."""

    num_tokens: FloatArray
    """Tokens of all ranks together."""
    active_experts: FloatArray
    """Experts of the rank that at least one token chose: weights that must be read."""
    assignments: FloatArray
    """(token, expert) pairs on the rank: rows of its grouped GEMM."""


def expected_active_experts(
    num_tokens: ArrayLike, *, num_experts: int, top_k: int, power_law_alpha: float = 0.0
) -> FloatArray:
    """Return how many experts at least one of `num_tokens` independent tokens chooses.

    Balanced routing gives E·(1 − (1 − k/E)^m); otherwise each expert has its own chance
    of being chosen, and the sum of 1 − (1 − qᵢ)^m takes the place of it.

    Args:
        num_tokens: Tokens m that are routed together.
        num_experts: Experts E of the layer.
        top_k: Experts k of one token.
        power_law_alpha: Exponent of expert popularity; 0 is balanced.
    """
    m = np.asarray(num_tokens, dtype=np.float64)
    chance = _choice_probability(num_experts, top_k, power_law_alpha)
    return np.asarray(np.sum(1 - (1 - chance) ** m[..., None], axis=-1))


def busiest_rank_load(
    num_tokens: ArrayLike,
    *,
    num_experts: int,
    top_k: int,
    num_ranks: int,
    power_law_alpha: float,
) -> RankLoad:
    """Return the load of the busiest of `num_ranks` ranks that share the experts.

    Args:
        num_tokens: Tokens of all ranks together.
        num_experts: Experts of the layer, split evenly over the ranks.
        top_k: Experts of one token.
        num_ranks: Expert-parallel ranks.
        power_law_alpha: Exponent of expert popularity; 0 is balanced.
    """
    tokens = np.maximum(np.asarray(num_tokens, dtype=np.float64), 1.0)
    log_active, log_assignments = _log_load(num_experts, top_k, num_ranks, power_law_alpha)
    log_knots, log_tokens = np.log(TOKEN_KNOTS), np.log(tokens)
    beyond = np.maximum(tokens / TOKEN_KNOTS[-1], 1.0)
    return RankLoad(
        num_tokens=tokens,
        active_experts=np.asarray(np.exp(np.interp(log_tokens, log_knots, log_active))),
        assignments=np.exp(np.interp(log_tokens, log_knots, log_assignments)) * beyond,
    )


def _choice_probability(num_experts: int, top_k: int, alpha: float) -> FloatArray:
    """Chance that one token chooses each expert; they sum to `top_k`."""
    if not alpha:
        return np.full(num_experts, top_k / num_experts)
    quantile = (np.arange(num_experts) + 0.5) / num_experts
    popularity = _power_law(quantile, alpha, *FEW_TOKENS_RANGE)
    chance = np.zeros(num_experts)
    for _ in range(top_k):  # an expert chosen for certain passes its excess to the others
        open_ = chance < 1
        missing = top_k - chance.sum()
        chance[open_] += missing * popularity[open_] / popularity[open_].sum()
        chance = np.minimum(chance, 1.0)
    return chance


@lru_cache(maxsize=4096)
def _log_load(
    num_experts: int, top_k: int, num_ranks: int, alpha: float
) -> tuple[FloatArray, FloatArray]:
    """Logarithms of active experts and assignments of the busiest rank at `TOKEN_KNOTS`.

    The running maximum bridges the number of tokens at which the range of popularities
    changes, so that one token more never means less work.
    """
    loads = [_mean_load(int(m), num_experts, top_k, num_ranks, alpha) for m in TOKEN_KNOTS]
    active, assignments = np.log(np.maximum.accumulate(np.maximum(loads, 1.0), axis=0)).T
    return active, assignments


def _mean_load(
    num_tokens: int, num_experts: int, top_k: int, num_ranks: int, alpha: float
) -> tuple[float, float]:
    local = -(-num_experts // num_ranks)
    total = num_tokens * top_k
    if not alpha:
        assignments = -(-total // num_ranks) if total < num_experts else total / num_ranks
        return min(local, assignments), assignments
    counts = _rounded_counts(num_tokens, num_experts, total, alpha)
    empty_slots = num_ranks * local - num_experts
    by_rank = np.pad(counts, ((0, 0), (0, empty_slots))).reshape(-1, num_ranks, local)
    left_over = total - by_rank.sum((1, 2))
    dealt = (np.arange(num_ranks) < (left_over % num_ranks)[:, None]) + (left_over // num_ranks)[
        :, None
    ]
    assignments = np.maximum(by_rank.sum(2) + dealt, 0)
    woken = (by_rank > 0).sum(2) + np.maximum(dealt, 0)
    active = np.minimum(np.minimum(woken, local), assignments)
    busiest = np.argmax(assignments, axis=1)[:, None]
    return (
        float(np.take_along_axis(active, busiest, 1).mean()),
        float(np.take_along_axis(assignments, busiest, 1).mean()),
    )


def _rounded_counts(num_tokens: int, num_experts: int, total: int, alpha: float) -> FloatArray:
    """Tokens of each expert in each draw, before left-overs are dealt."""
    many = total > num_experts
    low, high = (1.0, max(MANY_TOKENS_SHARE * num_tokens, 1.0)) if many else FEW_TOKENS_RANGE
    num_draws = -(-NUM_POPULARITIES // num_experts)
    popularity = _power_law(_spread_points(num_draws, num_experts), alpha, low, high)
    counts = np.round(popularity / popularity.sum(1, keepdims=True) * total)
    return np.asarray(np.minimum(counts, num_tokens))


def _power_law(quantile: FloatArray, alpha: float, low: float, high: float) -> FloatArray:
    """Quantiles of the density x^−alpha between `low` and `high`."""
    if abs(alpha - 1) < 1e-9:
        return np.asarray(low * (high / low) ** quantile)
    power = 1 - alpha
    span = high**power - low**power
    return np.asarray((span * quantile + low**power) ** (1 / power))


def _spread_points(rows: int, columns: int) -> FloatArray:
    """Fixed points in (0, 1) that scatter as random ones do: fractions of i²·√2.

    Unlike the fractions of i·√2 they cluster, so that some ranks come out hotter than
    others (Rudnick and Sarnak 1998, on their pair correlations).
    """
    index = np.arange(1, rows * columns + 1, dtype=np.float64)
    return np.asarray((index * index * np.sqrt(2.0)) % 1.0).reshape(rows, columns)
