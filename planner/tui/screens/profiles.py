"""Profiles: browse what is shipped, and put two side by side."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from planner.tui.catalogue import KINDS, Entry, profile_text
from planner.tui.screens.base import PlannerScreen
from planner.tui.widgets.text_input import TextInput

TITLES = {
    "gpu": "GPUs",
    "model": "Models",
    "workload": "Workloads",
    "engine": "Engines",
    "calibration": "Calibrations",
}


class ProfilesScreen(PlannerScreen):
    """GPUs, models, workloads, engines and calibrations, with the files behind them."""

    MODE = "profiles"
    HELP_TEXT = (
        "Type to narrow the list, ↓ goes into it. c keeps the highlighted profile beside the "
        "next ones; c on the same profile lets it go."
    )
    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("c", "compare", "Keep beside"),
        Binding("slash", "search", "Search"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.kept: Entry | None = None

    def compose_body(self) -> ComposeResult:
        """Lay out list and file."""
        with Horizontal(id="body"):
            with Vertical(id="listing"):
                yield TextInput(placeholder="search", compact=True, id="profile-search")
                yield OptionList(id="profile-list", compact=True)
            with VerticalScroll(id="detail"), Horizontal(id="pair"):
                yield Static("", id="kept", markup=False)
                yield Static("", id="current", markup=False)

    def on_mount(self) -> None:
        """Show the list."""
        self.query_one("#kept").display = False
        self.on_catalogue()
        self.query_one("#profile-list").focus()

    def on_catalogue(self) -> None:
        """Fill the list."""
        self._fill(self.query_one("#profile-search", Input).value)

    @on(Input.Changed, "#profile-search")
    def narrow(self, event: Input.Changed) -> None:
        """Keep the profiles that hold every typed word."""
        self._fill(event.value)

    @on(Input.Submitted, "#profile-search")
    def enter_list(self) -> None:
        """Go into the list."""
        self.query_one("#profile-list").focus()

    @on(OptionList.OptionHighlighted, "#profile-list")
    def show(self) -> None:
        """Show the file of the highlighted profile."""
        entry = self._entry()
        if entry is not None:
            self.query_one("#current", Static).update(_text(entry))

    def action_compare(self) -> None:
        """Keep the highlighted profile on the left, or let it go."""
        entry = self._entry()
        self.kept = None if entry == self.kept else entry
        kept = self.query_one("#kept", Static)
        kept.display = self.kept is not None
        kept.update(_text(self.kept) if self.kept else "")

    def action_search(self) -> None:
        """Go to the search."""
        self.query_one("#profile-search").focus()

    def _entry(self) -> Entry | None:
        options = self.query_one("#profile-list", OptionList)
        if options.highlighted is None:
            return None
        wanted = options.get_option_at_index(options.highlighted).id
        entries = self.planner_app.catalogue.entries
        return next((e for e in entries if f"{e.kind}/{e.name}" == wanted), None)

    def _fill(self, text: str) -> None:
        words = text.lower().split()
        options = self.query_one("#profile-list", OptionList)
        options.clear_options()
        for kind in KINDS:
            entries = [e for e in self.planner_app.catalogue.of(kind) if _matches(e, words)]
            if entries:
                options.add_option(Option(Content(TITLES[kind]).stylize("bold"), disabled=True))
            options.add_options(
                Option(Content(f"  {e.name}"), id=f"{e.kind}/{e.name}") for e in entries
            )
        options.action_first()


def _matches(entry: Entry, words: list[str]) -> bool:
    text = f"{entry.kind} {entry.name} {entry.summary}".lower()
    return all(word in text for word in words)


def _text(entry: Entry) -> str:
    try:
        body = profile_text(entry.path)
    except OSError as error:
        body = f"✗ {entry.path} cannot be read: {error.strerror}"
    return f"{entry.name}\n{entry.summary}\n\n{body}"
