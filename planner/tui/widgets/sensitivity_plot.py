"""What each value of one knob would do to one metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from textual.binding import Binding
from textual_plot import HiResMode
from textual_plot.axis_formatter import CategoricalAxisFormatter

from planner.tui.widgets.knob_list import spelled
from planner.tui.widgets.plot import Plot
from planner.what_if import COMPARED, SensitivityPoint, metric_value

NAME_WIDTH = 10
"""Letters of a value below the axis."""


class SensitivityPlot(Plot, inherit_bindings=False):
    """One metric over the values of one knob; ◆ is the present value, ✗ cannot be deployed."""

    BINDINGS = [Binding("m,enter", "next_metric", "Next metric")]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(id="curve", allow_pan_and_zoom=False)
        self.knob, self.present = "", None
        self.points: tuple[SensitivityPoint, ...] = ()
        self.metric = 0

    def show(self, knob: str, points: Sequence[SensitivityPoint], present: Any) -> None:
        """Show the values of a knob."""
        self.knob, self.points, self.present = knob, tuple(points), present
        self._draw()

    def action_next_metric(self) -> None:
        """Go on to the next metric."""
        self.metric = (self.metric + 1) % len(COMPARED)
        self._draw()

    def notify_style_update(self) -> None:
        """Redraw in the colours of the theme."""
        super().notify_style_update()
        if self.is_mounted:
            self._draw()

    def _draw(self) -> None:
        self.clear()
        metric, title, unit, _ = COMPARED[self.metric]
        known = [(i, p) for i, p in enumerate(self.points, 1) if p.prediction is not None]
        if not known:
            return
        names = [spelled(point.value)[:NAME_WIDTH] for point in self.points]
        self.set_x_formatter(CategoricalAxisFormatter(names))
        self.set_xlabel(self.knob)
        self.border_title = f"{title}, {unit}  (m: next metric)"
        self.set_xlimits(0.5, len(names) + 0.5)
        self._draw_points(
            [(i, p, metric_value(p.prediction, metric)) for i, p in known if p.prediction]
        )

    def _draw_points(self, known: list[tuple[int, SensitivityPoint, float]]) -> None:
        colours = self.app.theme_variables
        x, y = [i for i, _, _ in known], [value for _, _, value in known]
        low, high = min(y), max(y)
        room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
        self.set_ylimits(min(max(low - room, 0.0), low), high + room)
        self.plot(x, y, line_style=colours["secondary"], hires_mode=HiResMode.BRAILLE)
        for index, point, value in known:
            marker, colour = "•", "primary"
            if point.reason:
                marker, colour = "✗", "error"
            if point.value == self.present:
                marker, colour = "◆", "warning"
            self.scatter([index], [value], marker=marker, marker_style=colours[colour])
