"""Knobs tried on a run: each is predicted, and what helps is kept with its effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import RATES, Effect, Remedy
from planner.diagnosis.prospect import Prospect, SimulatedProspect, ratios
from planner.prediction.predict import Prediction

SHOWN = (
    "ttft_ms.mean", "ttft_ms.p99", "tpot_ms.mean", "itl_ms.p99", "e2el_ms.mean",
    "output_tok_per_s",
)  # fmt: skip
"""Metrics of which an effect is told."""

LEAST_CHANGE = 0.01
"""Relative change below which an effect is not told."""

LEAST_GAIN = 0.02
"""Relative gain below which a knob is not worth turning."""

MOST_COST = 0.1
"""Relative loss in the whole time or the output rate from which a gain elsewhere is too dear."""

MOST_REMEDIES = 3

Knobs = Mapping[str, Any]


def effects(before: Prediction, after: Prediction) -> tuple[Effect, ...]:
    """Return the shown metrics that change."""
    found = (
        Effect(metric=name, before=before.value(name), after=after.value(name))
        for name in SHOWN
        if before.value(name) > 0
    )
    return tuple(e for e in found if abs(e.ratio - 1) >= LEAST_CHANGE)


def gain(before: Prediction, after: Prediction, metric: str) -> float:
    """Return by which share a metric gets better."""
    ratio = ratios(before, after).get(metric, 1.0)
    return 1 - (1 / ratio if metric in RATES else ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Knobs that help, with the prediction that shows it."""

    remedy: Remedy
    prediction: Prediction


def tried(
    case: RunCase, prospect: SimulatedProspect, changes: Iterable[Knobs], *, metric: str
) -> list[Tried]:
    """Return the changes that make a metric better, the best first, those with more GPUs last.

    Args:
        case: The run.
        prospect: Its own prediction.
        changes: Knobs to turn together, one mapping a remedy; of those that do the same, the first.
        metric: Which is to get better.
    """
    found: dict[tuple[str, ...], Tried] = {}
    for knobs in changes:
        after = prospect.with_knobs(**knobs)
        if after is None or not _is_worth_it(prospect.base, after, metric):
            continue
        outcome = tuple(f"{after.value(name):.4g}" for name in SHOWN)
        remedy = _remedy(case, prospect, knobs, after)
        found.setdefault(outcome, Tried(remedy=remedy, prediction=after))

    def rank(one: Tried) -> tuple[int, float]:
        return one.prediction.deployment.num_gpus, -gain(prospect.base, one.prediction, metric)

    return sorted(found.values(), key=rank)[:MOST_REMEDIES]


def remedies_of(found: Iterable[Tried]) -> tuple[Remedy, ...]:
    """Return the remedies alone."""
    return tuple(one.remedy for one in found)


def _is_worth_it(before: Prediction, after: Prediction, metric: str) -> bool:
    costs = (-gain(before, after, other) for other in ("e2el_ms.mean", "output_tok_per_s"))
    return gain(before, after, metric) >= LEAST_GAIN and max(costs) <= MOST_COST


def _remedy(case: RunCase, prospect: Prospect, knobs: Knobs, after: Prediction) -> Remedy:
    words = [case.turn(name, prospect.deployment.knob(name), knobs[name]) for name in knobs]
    return Remedy(
        knob=case.knob(next(iter(knobs))),
        action=", ".join(words),
        effects=effects(prospect.base, after),
    )
