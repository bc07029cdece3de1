"""The expected loss of a configuration: observations weighted by nearness in size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import NormalDist
from typing import Any

QUALITY_LOSS = "quality_loss_pct"
"""Name of the loss among a plan's metrics and limits."""

LEAST_SPREAD_PCT = 0.3
"""Standard deviation that one published number has at least: a benchmark's own noise."""

NORMAL_Q95 = 1.645
"""Standard deviations to either side that hold 90 % of a normal distribution."""

SMALLEST_LIMIT_PCT = 0.01
"""A limit of 0 still has a size, by which the distance from it is measured."""

UNQUANTIZED_KV = ("bf16", "fp16", "auto")


class Source(StrEnum):
    """Where a loss comes from."""

    EXACT = "exact"
    """Nothing is rounded beside the published checkpoint."""
    PUBLISHED = "published"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLoss:
    """What a configuration is expected to lose beside the published checkpoint, in percent.

    The relative fall of a benchmark's score or rise of a perplexity, whichever its source gives.
    """

    loss_pct: float = 0.0
    spread_pct: float = 0.0
    """One standard deviation."""
    provenance: Source = Source.EXACT
    sources: tuple[str, ...] = ()

    @property
    def interval_90(self) -> tuple[float, float]:
        """Return the interval that holds 90 % of models of this size."""
        return self.loss_pct - self._reach(0.1), self.loss_pct + self._reach(0.1)

    def at_risk(self, risk: float) -> float:
        """Return the upper end of the interval of 1 - risk; 0 asks for the value itself."""
        return self.loss_pct + (self._reach(risk) if risk else 0.0)

    def excess(self, limit_pct: float, risk: float) -> float:
        """Return how far it is beyond a limit, as a share of it; 0 or less meets it."""
        return (self.at_risk(risk) - limit_pct) / max(limit_pct, SMALLEST_LIMIT_PCT)

    def __add__(self, other: QualityLoss) -> QualityLoss:
        """Return the loss of both together: small losses add up, their errors in quadrature."""
        if other.provenance is Source.EXACT:
            return self
        if self.provenance is Source.EXACT:
            return other
        measured = self.provenance is other.provenance is Source.MEASURED
        return QualityLoss(
            loss_pct=self.loss_pct + other.loss_pct,
            spread_pct=math.hypot(self.spread_pct, other.spread_pct),
            provenance=Source.MEASURED if measured else Source.PUBLISHED,
            sources=tuple(dict.fromkeys((*self.sources, *other.sources))),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "loss_pct": round(self.loss_pct, 3),
            "interval_90": [round(bound, 3) for bound in self.interval_90],
            "provenance": str(self.provenance),
            "sources": list(self.sources),
        }

    def _reach(self, risk: float) -> float:
        return self.spread_pct * NormalDist().inv_cdf(1 - risk / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One published loss."""

    model: str
    loss_pct: float
    metric: str
    source: str
    spread_pct: float = 0.0
    """Half width, where a range is published and no value."""
    parameters: float = 0.0
    """Of the model that was judged; 0 where a source speaks of several sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityTable:
    """Losses by precision for one model; what was measured stands before what was published."""

    weights: Mapping[str, QualityLoss] = field(default_factory=dict)
    """By quantization."""
    kv_cache: Mapping[str, QualityLoss] = field(default_factory=dict)
    """By KV-cache dtype."""
    measured: Mapping[tuple[str, str], QualityLoss] = field(default_factory=dict)
    """By quantization and KV-cache dtype, of this model."""
    native: str = "bf16"
    """Quantization of the published checkpoint: what losses are relative to."""

    def loss(self, quantization: str, kv_cache_dtype: str) -> QualityLoss:
        """Return what a pair of precisions is expected to lose."""
        kv = "bf16" if kv_cache_dtype in UNQUANTIZED_KV else kv_cache_dtype
        weights = "bf16" if quantization in (self.native, "fp16") else quantization
        if (weights, kv) in self.measured:
            return self.measured[weights, kv]
        of_weights = self.measured.get((weights, "bf16")) or self.weights.get(weights)
        of_kv = self.measured.get(("bf16", kv)) or self.kv_cache.get(kv)
        return (of_weights or QualityLoss()) + (of_kv or QualityLoss())


def pooled(observations: Sequence[Observation], parameters: float) -> QualityLoss:
    """Return what observations say of a model of some size.

    Quantization costs small models more, so each counts by how near in size it is: one of
    another size by a factor of r weighs 1 / (1 + log2(r)^2).
    """
    weights = [_nearness(one.parameters, parameters) for one in observations]
    total = sum(weights)
    mean = sum(w * one.loss_pct for w, one in zip(weights, observations, strict=True)) / total
    variance = sum(
        w * ((one.loss_pct - mean) ** 2 + (one.spread_pct / NORMAL_Q95) ** 2)
        for w, one in zip(weights, observations, strict=True)
    )
    return QualityLoss(
        loss_pct=mean,
        spread_pct=math.hypot(math.sqrt(variance / total), LEAST_SPREAD_PCT),
        provenance=Source.PUBLISHED,
        sources=tuple(dict.fromkeys(one.source for one in observations)),
    )


def _nearness(size: float, wanted: float) -> float:
    if not size or not wanted:
        return 1.0
    return 1 / (1 + math.log2(size / wanted) ** 2)
