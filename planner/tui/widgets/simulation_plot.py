"""A simulated run over time: KV blocks, the length of its steps, who runs and who waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from textual_plot import HiResMode, LegendLocation

from planner.tui.widgets.plot import Plot

if TYPE_CHECKING:
    from planner.simulator.timeline import Timeline

VIEWS = ("KV blocks", "steps", "queue")

STEP_MARKERS = (("decode", "·", "primary"), ("prefill", "▲", "warning"), ("mixed", "+", "error"))
"""(kind, marker, colour), in the order of `planner.simulator.timeline.KINDS`."""

Line = tuple[str, Sequence[float], str]
"""(name, values, colour)."""


class SimulationPlot(Plot, inherit_bindings=False):
    """One view of a simulated run."""

    def __init__(self) -> None:
        super().__init__(id="simulation", allow_pan_and_zoom=False)
        self.timeline: Timeline | None = None
        self.view = VIEWS[0]

    def on_mount(self) -> None:
        """Make room for the numbers."""
        super().on_mount()
        self.set_xlabel("simulated seconds")

    def show(self, timeline: Timeline | None, view: str) -> None:
        """Show a view of a run; None waits for one."""
        self.timeline, self.view = timeline, view
        self._draw()

    def notify_style_update(self) -> None:
        """Redraw in the colours of the theme."""
        super().notify_style_update()
        if self.is_mounted:
            self._draw()

    def _draw(self) -> None:
        self.clear()
        seen = self.timeline
        if seen is None:
            self.border_title = f"{self.view}: simulating …"
            return
        if self.view == "KV blocks":
            self.border_title = f"KV blocks of {seen.capacity_blocks:,.0f} (v: next view)"
            self._lines(
                ("used", seen.used_blocks.tolist(), "primary"),
                ("wasted", seen.wasted_blocks.tolist(), "error"),
                ("shared", seen.shared_blocks.tolist(), "warning"),
            )
        elif self.view == "queue":
            self.border_title = "sequences of all engines (v: next view)"
            self._lines(
                ("running", seen.running.tolist(), "primary"),
                ("waiting", seen.waiting.tolist(), "error"),
            )
        else:
            self.border_title = "ms per step of one engine (v: next view)"
            self._steps(seen)

    def _lines(self, *lines: Line) -> None:
        assert self.timeline is not None  # noqa: S101  for the reader and mypy
        x, colours = self.timeline.at_s.tolist(), self.app.theme_variables
        for name, values, colour in lines:
            if any(values):
                self.plot(
                    x, values, line_style=colours[colour], hires_mode=HiResMode.BRAILLE, label=name
                )
        self.set_ylimits(0.0, max((max(v) for _, v, _ in lines), default=0.0) * 1.1 or 1.0)
        self.show_legend(location=LegendLocation.TOPRIGHT)

    def _steps(self, seen: Timeline) -> None:
        colours = self.app.theme_variables
        works = np.isfinite(seen.step_s)
        for kind, (name, marker, colour) in enumerate(STEP_MARKERS):
            rows = works & (seen.kind == kind)
            if rows.any():
                x, y = seen.at_s[rows].tolist(), (1e3 * seen.step_s[rows]).tolist()
                self.scatter(x, y, marker=marker, marker_style=colours[colour], label=name)
        self.set_ylimits(0.0, 1.1e3 * float(np.nanmax(seen.step_s, initial=1e-3)))
        self.show_legend(location=LegendLocation.TOPRIGHT)
