"""Quality from what was counted per document, with bootstrap intervals over the documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

RESAMPLES = 1000
"""Enough that the ends of an interval move by less than a twentieth of its width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """Sums over the predicted tokens of one document."""

    num_tokens: float
    nll_nats: float
    """Negative log likelihood under the judged model."""
    reference_nll_nats: float
    kl_nats: float
    """Divergence of the judged model's distribution from the reference's."""
    top1_matches: float
    """Tokens at which both models would say the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval of 90 %."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """Return value and interval."""
        return {"value": _plain(self.value), "interval_90": [_plain(self.low), _plain(self.high)]}


def likelihood_estimates(documents: Sequence[Likelihoods], *, seed: int) -> dict[str, Estimate]:
    """Return perplexities, their relative difference, KL and top-1 agreement."""
    table = {
        field.name: np.array([getattr(document, field.name) for document in documents])
        for field in fields(Likelihoods)
    }
    return _bootstrapped(_likelihood_metrics, table, seed=seed)


def _likelihood_metrics(sums: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    tokens = sums["num_tokens"]
    judged = np.exp(sums["nll_nats"] / tokens)
    reference = np.exp(sums["reference_nll_nats"] / tokens)
    return {
        "perplexity": judged,
        "reference_perplexity": reference,
        "perplexity_loss_pct": 100
        * np.expm1((sums["nll_nats"] - sums["reference_nll_nats"]) / tokens),
        "kl_nats_per_token": sums["kl_nats"] / tokens,
        "top1_agreement_pct": 100 * sums["top1_matches"] / tokens,
    }


def text_estimates(
    generated: Sequence[str], references: Sequence[str], *, seed: int
) -> dict[str, Estimate]:
    """Return BLEU of all generations together, and the mean F of ROUGE-1, -2 and -L."""
    table = _bleu_table(generated, references) | _rouge_table(generated, references)
    return _bootstrapped(_text_metrics, table, seed=seed)


def _bleu_table(generated: Sequence[str], references: Sequence[str]) -> dict[str, FloatArray]:
    """Return what BLEU sums over documents: n-gram matches, n-grams, lengths."""
    from sacrebleu import sentence_bleu  # noqa: PLC0415  optional

    scores = [sentence_bleu(one, [other]) for one, other in zip(generated, references, strict=True)]
    table = {
        f"{name}{n}": np.array([getattr(score, name)[n] for score in scores], dtype=np.float64)
        for name in ("counts", "totals")
        for n in range(4)
    }
    lengths = {
        name: np.array([getattr(s, name) for s in scores]) for name in ("sys_len", "ref_len")
    }
    return table | {name: column.astype(np.float64) for name, column in lengths.items()}


def _rouge_table(generated: Sequence[str], references: Sequence[str]) -> dict[str, FloatArray]:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415  optional

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names))
    scores = [scorer.score(other, one) for one, other in zip(generated, references, strict=True)]
    table = {
        name: np.array(
            [
                _rouge(score[name].fmeasure, one, other)
                for score, one, other in zip(scores, generated, references, strict=True)
            ]
        )
        for name in names
    }
    return table | {"documents": np.ones(len(scores))}


def _rouge(fmeasure: float, generated: str, reference: str) -> float:
    """ROUGE knows letters and digits only: the same text without any is the same text."""
    return 1.0 if generated == reference else fmeasure


def _text_metrics(sums: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    rouges = {
        f"{name}_pct": 100 * sums[name] / sums["documents"]
        for name in ("rouge1", "rouge2", "rougeL")
    }
    return {"bleu": np.asarray([_bleu(row) for row in _rows(sums)])} | rouges


def _rows(sums: Mapping[str, FloatArray]) -> list[dict[str, float]]:
    size = len(sums["documents"])
    return [{name: float(column[row]) for name, column in sums.items()} for row in range(size)]


def _bleu(sums: Mapping[str, float]) -> float:
    """BLEU of summed counts (Papineni et al. 2002), as sacrebleu computes it, at most 100."""
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415  optional

    if sums["sys_len"] == sums["ref_len"] == 0:
        return 100.0
    # Effective order: a resample of short texts may hold no 4-gram at all.
    score = BLEU.compute_bleu(
        [int(sums[f"counts{n}"]) for n in range(4)],
        [int(sums[f"totals{n}"]) for n in range(4)],
        int(sums["sys_len"]),
        int(sums["ref_len"]),
        effective_order=True,
    )
    return min(float(score.score), 100.0)


def _bootstrapped(
    metrics: Callable[[Mapping[str, FloatArray]], dict[str, FloatArray]],
    table: Mapping[str, FloatArray],
    *,
    seed: int,
) -> dict[str, Estimate]:
    """Return each metric of all documents, and the middle 90 % of those of resampled documents.

    Documents are drawn with replacement (Efron 1979), alike for all metrics: tokens of one
    document are not independent, documents are.
    """
    size = len(next(iter(table.values())))
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    point = metrics({name: column.sum(keepdims=True) for name, column in table.items()})
    spread = metrics({name: draws @ column for name, column in table.items()})
    return {
        name: Estimate(
            value=float(values[0]),
            low=float(np.quantile(spread[name], 0.05)),
            high=float(np.quantile(spread[name], 0.95)),
        )
        for name, values in point.items()
    }


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
