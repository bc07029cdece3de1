"""Knobs tried on a run: each is predicted, and what helps is kept with its effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import RATES, Effect, Remedy
from planner.diagnosis.prospect import ratios
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


def tried(case: RunCase, changes: Iterable[Knobs], *, metric: str) -> list[tuple[Knobs, Remedy]]:
    """Return the changes that make a metric better, the best first, those with more GPUs last.

    Args:
        case: A run whose requests were simulated.
        changes: Knobs to turn together, one mapping a remedy; of those that do the same, the first.
        metric: Which is to get better.
    """
    prospect = case.prospect
    assert prospect is not None, "only what is predicted can be tried"
    found, seen = [], set()
    for knobs in changes:
        after = prospect.with_knobs(**knobs)
        if after is None or not _is_worth_it(prospect.base, after, metric):
            continue
        outcome = tuple(f"{after.value(name):.4g}" for name in SHOWN)
        if outcome in seen:
            continue
        seen.add(outcome)
        rank = (after.config.num_gpus, -gain(prospect.base, after, metric))
        found.append((rank, knobs, _remedy(case, knobs, effects(prospect.base, after))))
    found.sort(key=lambda one: one[0])
    return [(knobs, remedy) for _, knobs, remedy in found[:MOST_REMEDIES]]


def _is_worth_it(before: Prediction, after: Prediction, metric: str) -> bool:
    costs = (-gain(before, after, other) for other in ("e2el_ms.mean", "output_tok_per_s"))
    return gain(before, after, metric) >= LEAST_GAIN and max(costs) <= MOST_COST


def _remedy(case: RunCase, knobs: Knobs, changed: tuple[Effect, ...]) -> Remedy:
    prospect = case.prospect
    assert prospect is not None, "only what is predicted can be tried"
    words = [case.turn(name, getattr(prospect.config, name), knobs[name]) for name in knobs]
    first = next(iter(knobs))
    return Remedy(knob=case.knob(first), action=", ".join(words), effects=changed)
