"""What every main screen has: the list of screens above, the keys below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Footer, Static

from planner.tui.messages import RunsValidated, Session
from planner.tui.screens import SCREENS, ScreenEntry

if TYPE_CHECKING:
    from planner.tui.catalogue import Catalogue
    from planner.tui.state import State


class Frame(Protocol):
    """What screens ask of the application that holds them."""

    state: State
    session: Session | None
    validation: RunsValidated | None
    catalogue: Catalogue
    may_take_local_gpu: bool
    search_effort: dict[str, Any]

    @property
    def calibration_folder(self) -> Path:
        """Where the user's own calibrations lie."""

    def own_calibrations(self) -> dict[str, str]:
        """Return the user's own calibration files by engine."""

    def calibration_in_force(self, engine: str) -> tuple[str, float]:
        """Return the user's own file for an engine and when it was written, in s since 1970."""

    def remember(self, **changes: Any) -> None:
        """Keep part of the state for the next time."""


class PlannerScreen(Screen[None]):
    """A main screen."""

    MODE = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012  Textual's form
    VERTICAL_BREAKPOINTS = [(0, "-short"), (30, "-tall")]  # noqa: RUF012
    HELP_TEXT = ""

    @property
    def planner_app(self) -> Frame:
        """The application, as screens see it."""
        return cast("Frame", self.app)

    @property
    def session(self) -> Session | None:
        """The plan at hand."""
        return self.planner_app.session

    def compose(self) -> ComposeResult:
        """Lay out the frame and, between, the body."""
        # Textual would set these after the first layout, and style everything twice.
        self.add_class(_at(self.app.size.width, self.HORIZONTAL_BREAKPOINTS))
        self.add_class(_at(self.app.size.height, self.VERTICAL_BREAKPOINTS))
        tabs = (_tab(entry, is_open=entry.mode == self.MODE) for entry in SCREENS)
        yield Static("".join(tabs), id="tabs")
        yield from self.compose_body()
        yield Footer(compact=True, show_command_palette=False)

    def compose_body(self) -> ComposeResult:
        """Lay out what is particular to the screen."""
        raise NotImplementedError

    def on_catalogue(self) -> None:
        """The shipped profiles are known now; screens that list them fill in."""


def _at(size: int, breakpoints: Sequence[tuple[int, str]]) -> str:
    """Return the class of the widest breakpoint that a size reaches."""
    return max(entry for entry in breakpoints if entry[0] <= size)[1]


def _tab(entry: ScreenEntry, *, is_open: bool) -> str:
    """Return one entry of the list of screens, a link for the mouse."""
    style = "reverse bold" if is_open else "dim"
    return f"[{style}][@click=app.switch_mode('{entry.mode}')] {entry.key} {entry.title} [/][/]"
