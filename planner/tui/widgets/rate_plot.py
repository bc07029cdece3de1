"""Output tokens per second of a measurement, as they come."""

from __future__ import annotations

from collections.abc import Sequence

from textual_plot import HiResMode

from planner.tui.widgets.plot import Plot


class RatePlot(Plot, inherit_bindings=False):
    """Tokens/s over the seconds of the load."""

    def __init__(self) -> None:
        super().__init__(id="rates", allow_pan_and_zoom=False)

    def on_mount(self) -> None:
        """Name the axes."""
        super().on_mount()
        self.border_title = "output tokens/s"

    def show(self, rates: Sequence[tuple[float, float]]) -> None:
        """Show (seconds, tokens/s)."""
        self.clear()
        if len(rates) < 2:
            return
        x, y = [at_s for at_s, _ in rates], [rate for _, rate in rates]
        colour = self.app.theme_variables["primary"]
        self.plot(x, y, line_style=colour, hires_mode=HiResMode.BRAILLE)
        self.set_ylimits(0.0, max(y) * 1.1 or 1.0)
