"""The Pareto front as a plot, with a cursor that moves along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual.binding import Binding
from textual.message import Message
from textual_plot import HiResMode

from planner.search.study import Candidate
from planner.tui.widgets.plot import Plot


class FrontPlot(Plot, inherit_bindings=False):
    """Tokens/s per GPU against the speed that one user sees."""

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
        self.recommended: Candidate | None = None
        self.cursor: int | None = None

    def on_mount(self) -> None:
        """Name the axes."""
        super().on_mount()
        self.margin_left, self.margin_top = 8, 1
        self.set_xlabel("tokens/s per user")
        self.border_title = "tokens/s per GPU, every slot taken"

    def show(self, candidates: Sequence[Candidate], recommended: Candidate) -> None:
        """Show a front; the cursor returns to the recommendation."""
        self.candidates = tuple(sorted(candidates, key=lambda c: c.tok_per_s_per_user))
        self.recommended, self.cursor = recommended, None
        self._draw()

    def action_move(self, by: int) -> None:
        """Move the cursor along the front."""
        if not self.candidates:
            return
        start = self._nearest() if self.cursor is None else self.cursor
        self.cursor = min(max(start + by, 0), len(self.candidates) - 1)
        self._draw()
        self.post_message(self.Moved(self.cursor))

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
        x = [c.tok_per_s_per_user for c in self.candidates]
        y = [c.tok_per_s_per_gpu for c in self.candidates]
        self.plot(x, y, line_style=colours["secondary"], hires_mode=HiResMode.BRAILLE)
        self.scatter(x, y, marker="•", marker_style=colours["primary"])
        best = self.recommended
        if best is not None:
            self.scatter(
                [best.tok_per_s_per_user], [best.tok_per_s_per_gpu],
                marker="★", marker_style=colours["accent"],
            )  # fmt: skip
        if self.cursor is not None:
            at = self.candidates[self.cursor]
            self.scatter(
                [at.tok_per_s_per_user], [at.tok_per_s_per_gpu],
                marker="◆", marker_style=colours["warning"],
            )  # fmt: skip
