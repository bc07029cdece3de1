"""What a diagnosis says: complaints, causes with their evidence, and remedies with their effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

RATES = frozenset({"output_tok_per_s", "request_per_s", "goodput_request_per_s"})
"""Metrics of which more is better; all others are times."""

LEAST_SHARE = 0.05
"""Share of a complaint below which a cause is not worth naming."""


class ComplaintKind(StrEnum):
    """Why a run is looked at."""

    FAILED = "failed"
    MISSES_SLO = "misses_slo"
    WORSE_THAN_PREDICTED = "worse_than_predicted"
    TAIL = "tail"
    """Nothing is wrong by itself, but a percentile lies far above the median."""
    TIME = "time"
    """Nothing is wrong by itself: where the time went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """One thing that is wrong with a run; values in the unit of the metric's name."""

    kind: ComplaintKind
    metric: str
    """Empty for a failure."""
    measured: float
    reference: float
    """The limit, the prediction, or the median of a tail; 0 for the whole time."""
    words: str

    @property
    def is_trouble(self) -> bool:
        """Whether somebody would complain; else it only says where time went."""
        return self.kind not in (ComplaintKind.TAIL, ComplaintKind.TIME)

    @property
    def what(self) -> str:
        """What shares are shares of."""
        if self.kind is ComplaintKind.MISSES_SLO:
            return f"what {self.metric} is over its limit"
        if self.kind is ComplaintKind.WORSE_THAN_PREDICTED:
            return f"what {self.metric} is off its prediction"
        return f"the tail of {self.metric}" if self.kind is ComplaintKind.TAIL else self.metric

    def share_of(self, ratio: float) -> float:
        """Return the share of the excess that goes where the metric is multiplied by a ratio."""
        measured, reference = self.measured, self.reference
        if self.metric in RATES:
            # As time per token: what a rate lacks is not in proportion to what it costs.
            measured, reference = 1 / measured, 1 / reference if reference else 0.0
            ratio = 1 / ratio
        return min(max(measured * (1 - ratio) / (measured - reference), 0.0), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One metric, predicted with a knob as it was and turned."""

    metric: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """What to turn, and what that is predicted to do."""

    knob: str
    """TensorRT-LLM's option, or vLLM's flag where that engine ran; empty where none does it."""
    action: str
    effects: tuple[Effect, ...] = ()
    note: str = ""
    """What is known of the effect beside the metrics, as the memory that it frees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One cause, as found in one run."""

    cause: str
    """Its name in the registry."""
    words: str
    evidence: tuple[str, ...]
    remedies: tuple[Remedy, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    """By metric: what is left of it without this cause."""
    is_foreseen: bool = True
    """Whether the prediction knows of it, so that it explains nothing that the two differ by."""
    explains_failure: bool = False

    def explains(self, complaint: Complaint) -> float:
        """Return the share of a complaint that this cause accounts for."""
        if complaint.kind is ComplaintKind.FAILED:
            return float(self.explains_failure)
        if complaint.kind is ComplaintKind.WORSE_THAN_PREDICTED and self.is_foreseen:
            return 0.0
        ratio = self.ratios.get(complaint.metric)
        return complaint.share_of(ratio) if ratio is not None else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedFinding:
    """A cause with what it accounts for."""

    finding: Finding
    shares: Mapping[Complaint, float]

    @property
    def share(self) -> float:
        """The greatest of them."""
        return max(self.shares.values(), default=0.0)

    @property
    def rank(self) -> tuple[float, ...]:
        """What accounts for most of a trouble comes first, then of the time, then of a tail."""
        kinds = [
            [share for c, share in self.shares.items() if c.is_trouble],
            [share for c, share in self.shares.items() if c.kind is ComplaintKind.TIME],
            [share for c, share in self.shares.items() if c.kind is ComplaintKind.TAIL],
        ]
        return tuple(-max(shares, default=0.0) for shares in kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that is said of one run."""

    run_id: str
    status: str
    complaints: tuple[Complaint, ...]
    findings: tuple[RankedFinding, ...]
    """Greatest share first."""
    not_predicted: str = ""
    """Why the run could not be predicted; empty where it was."""

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong: no trouble, and no cause worth naming."""
        return not self.findings and not any(c.is_trouble for c in self.complaints)

    @property
    def unexplained(self) -> tuple[Complaint, ...]:
        """Troubles of which no cause accounts for anything."""
        explained = {complaint for ranked in self.findings for complaint in ranked.shares}
        return tuple(c for c in self.complaints if c.is_trouble and c not in explained)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "run_id": self.run_id,
            "status": self.status,
            "is_well": self.is_well,
            "not_predicted": self.not_predicted or None,
            "complaints": [
                {
                    "kind": str(c.kind),
                    "metric": c.metric or None,
                    "measured": c.measured,
                    "reference": c.reference,
                    "words": c.words,
                }
                for c in self.complaints
            ],
            "causes": [_finding_json(ranked) for ranked in self.findings],
            "unexplained": [c.words for c in self.unexplained],
        }


def ranked(
    findings: tuple[Finding, ...], complaints: tuple[Complaint, ...]
) -> tuple[RankedFinding, ...]:
    """Return the causes that account for something, most first; the unquantified come last."""
    rows = []
    for finding in findings:
        shares = {c: share for c in complaints if (share := finding.explains(c)) > 0}
        one = RankedFinding(finding=finding, shares=shares)
        is_unquantified = not finding.ratios and not finding.explains_failure
        if one.share >= LEAST_SHARE or is_unquantified:
            rows.append(one)
    return tuple(sorted(rows, key=lambda row: row.rank))


def _finding_json(ranked_finding: RankedFinding) -> dict[str, Any]:
    finding = ranked_finding.finding
    return {
        "cause": finding.cause,
        "words": finding.words,
        "explains": {c.words: round(share, 3) for c, share in ranked_finding.shares.items()},
        "evidence": list(finding.evidence),
        "remedies": [
            {
                "knob": remedy.knob or None,
                "action": remedy.action,
                "effects": {
                    e.metric: {"before": round(e.before, 4), "after": round(e.after, 4)}
                    for e in remedy.effects
                },
                "note": remedy.note or None,
            }
            for remedy in finding.remedies
        ],
    }
