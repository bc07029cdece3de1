"""A plot that is readable without colour and on few rows."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style
from textual.app import ComposeResult
from textual.containers import Grid
from textual.strip import Strip
from textual_hires_canvas import Canvas
from textual_plot import PlotWidget
from textual_plot.axis_formatter import NumericAxisFormatter
from textual_plot.plot_widget import Legend


class Plot(PlotWidget):
    """A plot whose canvases give every segment a style, as Textual's NO_COLOR filter needs."""

    def compose(self) -> ComposeResult:
        """Lay out the plot between its margins."""
        with Grid():
            for name in ("margin-top", "margin-left", "plot", "margin-bottom"):
                yield _StyledCanvas(1, 1, id=name)
        yield Legend(id="legend")

    def on_mount(self) -> None:
        """Make room for the numbers, and for no more of them than there are rows."""
        super().on_mount()
        self.margin_left, self.margin_top = 8, 1
        self.set_y_formatter(_RowTicks(self))

    @property
    def canvas(self) -> Canvas:
        """Where the data is drawn."""
        return self.query_one("#plot", Canvas)


def limits(values: list[float]) -> tuple[float, float]:
    """Return ends of an axis that leave room around the values: marks on a frame are cut."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


class _RowTicks(NumericAxisFormatter):
    """Ticks that stand on rows of their own: two on one row would hide each other."""

    def __init__(self, plot: Plot) -> None:
        self._plot = plot

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        ticks = [tick for tick in super().get_ticks(min_, max_, max_ticks) if tick <= max_]
        rows = max(self._plot.canvas.size.height - 2, 1)
        return ticks[:: max(-(-len(ticks) // rows), 1)]


class _StyledCanvas(Canvas):
    def render_line(self, y: int) -> Strip:
        strip = super().render_line(y)
        plain = Style.null()
        segments = [Segment(text, style or plain, control) for text, style, control in strip]
        return Strip(segments, strip.cell_length)
