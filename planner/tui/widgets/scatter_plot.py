"""Predicted against measured, a point a run with its 90 % interval; on the line is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual_plot import HiResMode, LegendLocation

from planner.tui.widgets.plot import Plot

if TYPE_CHECKING:
    from planner.validation.validate import Row

METRICS = (
    ("tpot_ms.mean", "TPOT mean, ms"),
    ("output_tok_per_s", "output tokens/s"),
    ("ttft_ms.mean", "TTFT mean, ms"),
    ("ttft_ms.p99", "TTFT P99, ms"),
    ("e2el_ms.p50", "E2E P50, ms"),
)
"""(metric, what people call it)."""


class ScatterPlot(Plot, inherit_bindings=False):
    """One metric of every run; `before` stays visible beside what a new fit predicts."""

    def __init__(self) -> None:
        super().__init__(id="scatter", allow_pan_and_zoom=False)
        self.rows: tuple[Row, ...] = ()
        self.before: tuple[Row, ...] = ()
        self.metric = 0

    def show(self, rows: Sequence[Row], before: Sequence[Row] = ()) -> None:
        """Show runs, and what was predicted of them before a new fit."""
        self.rows, self.before = tuple(rows), tuple(before)
        self._draw()

    def next_metric(self) -> None:
        """Go on to the next metric."""
        self.metric = (self.metric + 1) % len(METRICS)
        self._draw()

    def notify_style_update(self) -> None:
        """Redraw in the colours of the theme."""
        super().notify_style_update()
        if self.is_mounted:
            self._draw()

    def _draw(self) -> None:
        self.clear()
        metric, title = METRICS[self.metric]
        self.border_title = f"predicted against measured: {title} (^n: next)"
        self.set_xlabel("measured")
        colours = self.app.theme_variables
        rows = [row for row in self.rows if metric in row.scored()]
        if not rows:
            self.border_title = f"{title}: not measured in these runs (^n: next)"
            return
        end = 1.1 * max(max(row.run.measured[metric], row.predicted[metric]) for row in rows)
        self.plot([0, end], [0, end], line_style=colours["secondary"], hires_mode=HiResMode.BRAILLE)
        earlier = [row for row in self.before if metric in row.scored()]
        if earlier:
            x, y = _points(earlier, metric)
            self.scatter(x, y, marker="○", marker_style=colours["error"], label="before")
        x, y = _points(rows, metric)
        spans = [row.intervals[metric] for row in rows]
        self.errorbar(
            x,
            [(low + high) / 2 for low, high in spans],
            yerr=[(high - low) / 2 for low, high in spans],
            marker_style=colours["secondary"],
        )
        label = "after" if earlier else "predicted"
        self.scatter(x, y, marker="•", marker_style=colours["primary"], label=label)
        self.set_xlimits(0, end)
        self.set_ylimits(0, end)
        self.show_legend(location=LegendLocation.TOPLEFT, is_visible=bool(earlier))


def _points(rows: Sequence[Row], metric: str) -> tuple[list[float], list[float]]:
    return [r.run.measured[metric] for r in rows], [r.predicted[metric] for r in rows]
