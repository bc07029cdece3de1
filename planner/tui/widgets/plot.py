"""A plot that is readable without colour too."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style
from textual.app import ComposeResult
from textual.containers import Grid
from textual.strip import Strip
from textual_hires_canvas import Canvas
from textual_plot import PlotWidget
from textual_plot.plot_widget import Legend


class Plot(PlotWidget):
    """A plot whose canvases give every segment a style, as Textual's NO_COLOR filter needs."""

    def compose(self) -> ComposeResult:
        """Lay out the plot between its margins."""
        with Grid():
            for name in ("margin-top", "margin-left", "plot", "margin-bottom"):
                yield _StyledCanvas(1, 1, id=name)
        yield Legend(id="legend")


class _StyledCanvas(Canvas):
    def render_line(self, y: int) -> Strip:
        strip = super().render_line(y)
        plain = Style.null()
        segments = [Segment(text, style or plain, control) for text, style, control in strip]
        return Strip(segments, strip.cell_length)
