"""The Pareto front as a plot, with a cursor that moves along its fastest."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding
from textual.events import Click
from textual.message import Message
from textual_plot import HiResMode

from planner.search.study import Candidate, SearchResult
from planner.tui.widgets.plot import Plot, limits


class FrontPlot(Plot, inherit_bindings=False):
    """Tokens/s per GPU against the speed that one user sees.

    The line joins what nothing beats in both; `+` stands on the front only for its quality.
    """

    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("left", "move(-1)", "Slower per user"),
        Binding("right", "move(1)", "Faster per user"),
        Binding("home,r", "recommend", "Recommended"),
    ]

    @dataclass
    class Moved(Message):
        """The cursor stands on another candidate; None is the recommendation."""

        index: int | None

    def __init__(self) -> None:
        super().__init__(id="front", allow_pan_and_zoom=False)
        self.candidates: tuple[Candidate, ...] = ()
        self.for_quality: tuple[Candidate, ...] = ()
        """Slower than the line, and losing less than what lies above them."""
        self.recommended: Candidate | None = None
        self.cursor: int | None = None
        self.display = False  # there is nothing to see before a search has ended

    def on_mount(self) -> None:
        """Name the axes, and draw what was known before there was anything to draw on."""
        super().on_mount()
        self.set_xlabel("tokens/s per user")
        self.call_after_refresh(self._draw)

    def show(self, found: SearchResult) -> None:
        """Show the front of a search; the cursor returns to the recommendation."""
        fastest = found.fastest
        self.candidates = tuple(sorted(fastest, key=lambda c: c.tok_per_s_per_user))
        self.for_quality = tuple(c for c in found.pareto if c not in fastest)
        self.recommended, self.cursor = found.best, None
        self.display = bool(self.candidates)
        self._draw()

    def action_move(self, by: int) -> None:
        """Move the cursor along the front."""
        if not self.candidates:
            return
        start = self._nearest() if self.cursor is None else self.cursor
        self._go_to(min(max(start + by, 0), len(self.candidates) - 1))

    def on_click(self, event: Click) -> None:
        """Move the cursor to the candidate that is nearest to the mouse."""
        if self.candidates:
            at = event.screen_offset - self.canvas.region.offset
            spots = [self.get_pixel_from_coordinate(*_at(c)) for c in self.candidates]
            gaps = [(x - at.x) ** 2 + 4 * (y - at.y) ** 2 for x, y in spots]
            self._go_to(gaps.index(min(gaps)))

    def action_recommend(self) -> None:
        """Return the cursor to the recommendation."""
        self.cursor = None
        self._draw()
        self.post_message(self.Moved(None))

    def notify_style_update(self) -> None:
        """Redraw in the colours of the theme."""
        super().notify_style_update()
        if self.is_mounted:
            self._draw()

    def _go_to(self, index: int) -> None:
        self.cursor = index
        self._draw()
        self.post_message(self.Moved(index))

    def _nearest(self) -> int:
        if self.recommended is None:
            return 0
        speed = self.recommended.tok_per_s_per_user
        gaps = [abs(candidate.tok_per_s_per_user - speed) for candidate in self.candidates]
        return gaps.index(min(gaps))

    def _draw(self) -> None:
        self.clear()
        if not self.candidates:
            return
        colours = self.app.theme_variables
        x, y = (list(axis) for axis in zip(*map(_at, self.candidates), strict=True))
        drawn = (*self.candidates, *self.for_quality, self.recommended)
        shown = [_at(c) for c in drawn if c is not None]
        self.set_xlimits(*limits([at[0] for at in shown]))
        self.set_ylimits(*limits([at[1] for at in shown]))
        for candidate in self.for_quality:
            self._mark(candidate, "+", colours["secondary"])
        self.plot(x, y, line_style=colours["secondary"], hires_mode=HiResMode.BRAILLE)
        self.scatter(x, y, marker="•", marker_style=colours["primary"])
        if self.recommended is not None:
            self._mark(self.recommended, "★", colours["accent"])
        if self.cursor is not None:
            self._mark(self.candidates[self.cursor], "◆", colours["warning"])
        self.border_title = self._title()

    def _mark(self, candidate: Candidate, marker: str, style: str) -> None:
        x, y = _at(candidate)
        self.scatter([x], [y], marker=marker, marker_style=style)

    def _title(self) -> str:
        """Return what the cursor stands on: a small screen shows plot or tables, not both."""
        if self.cursor is None:
            loses_less = "; + loses less" if self.for_quality else ""
            return f"tok/s per GPU, every slot taken{loses_less}"
        at = self.candidates[self.cursor]
        return f"◆ {at.tok_per_s_per_gpu:,.0f} tok/s/GPU, {at.tok_per_s_per_user:,.0f} per user"


def _at(candidate: Candidate) -> tuple[float, float]:
    return candidate.tok_per_s_per_user, candidate.tok_per_s_per_gpu
