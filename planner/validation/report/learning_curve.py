"""The learning curve of a report: the error on held-out runs against the runs that were fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cost_models.errors import ProfileError
from cost_models.profile_io import read_json_object
from planner.validation.report.tables import HEADLINES, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Error after so many runs."""

    num_runs: int
    label: str
    mape_pct: dict[str, float]
    """By metric."""


def read_learning_curve(path: str) -> tuple[Point, ...]:
    """Read `{"points": [{"num_runs": 4, "label": "...", "mape_pct": {"tpot_ms.mean": 3.1}}]}`.

    Raises:
        ProfileError: Missing, damaged, or of another form.
    """
    data = read_json_object(Path(path))
    try:
        points = [
            Point(
                num_runs=int(point["num_runs"]),
                label=str(point.get("label", "")),
                mape_pct={str(k): float(v) for k, v in point["mape_pct"].items()},
            )
            for point in data["points"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(
            f"{path}: not a learning curve ({error!r})",
            hint='accepted: {"points": [{"num_runs": 4, "mape_pct": {"tpot_ms.mean": 3.1}}]}',
        ) from None
    bad = [
        p for p in points if p.num_runs < 0 or not all(_is_error(v) for v in p.mape_pct.values())
    ]
    if bad or not points:
        raise ProfileError(
            f"{path}: points is {'empty' if not points else 'out of range'}",
            hint="num_runs and mape_pct are 0 or more, and finite",
        )
    return tuple(sorted(points, key=lambda point: point.num_runs))


def learning_table(points: tuple[Point, ...]) -> Table:
    """The curve's numbers."""
    metrics = list(dict.fromkeys(name for point in points for name in point.mape_pct))
    return Table(
        name="learning",
        title="Learning curve",
        columns=("runs fitted", "", *(HEADLINES.get(name, name) for name in metrics)),
        rows=tuple(
            (
                point.num_runs,
                point.label,
                *(round(point.mape_pct[m], 1) if m in point.mape_pct else "–" for m in metrics),
            )
            for point in points
        ),
        note="Mean absolute error in percent on runs that were held out.",
    )


def _is_error(value: float) -> bool:
    return math.isfinite(value) and value >= 0
