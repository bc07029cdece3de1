"""A searchable list over the screen."""

from __future__ import annotations

from collections.abc import Sequence

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from planner.tui.catalogue import Entry


class PickScreen(ModalScreen[str | None]):
    """Choose one entry, narrowing the list by typing."""

    BINDINGS = [  # noqa: RUF012  Textual's form
        ("escape", "cancel", "Cancel"),
        ("down", "move(1)", "Next"),
        ("up", "move(-1)", "Previous"),
    ]

    def __init__(self, title: str, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.heading = title
        self.entries = tuple(entries)

    def compose(self) -> ComposeResult:
        """Lay out the dialog."""
        with Vertical(classes="dialog"):
            yield Static(f"{self.heading}: type to narrow, ↑ ↓ Enter, Esc cancels", classes="title")
            yield Input(placeholder="search", compact=True)
            yield OptionList(compact=True)

    def on_mount(self) -> None:
        """Show all of the list."""
        self._show("")

    @on(Input.Changed)
    def narrow(self, event: Input.Changed) -> None:
        """Keep the entries that hold every typed word."""
        self._show(event.value)

    @on(Input.Submitted)
    def submit(self) -> None:
        """Take the highlighted entry."""
        options = self.query_one(OptionList)
        if options.highlighted is not None:
            self.dismiss(options.get_option_at_index(options.highlighted).id)

    @on(OptionList.OptionSelected)
    def select(self, event: OptionList.OptionSelected) -> None:
        """Take the entry that was clicked."""
        self.dismiss(event.option_id)

    def action_cancel(self) -> None:
        """Leave the field as it was."""
        self.dismiss(None)

    def action_move(self, by: int) -> None:
        """Move the highlight while typing goes on."""
        options = self.query_one(OptionList)
        if options.option_count:
            options.highlighted = ((options.highlighted or 0) + by) % options.option_count

    def _show(self, text: str) -> None:
        words = text.lower().split()
        kept = [e for e in self.entries if all(w in f"{e.name} {e.summary}".lower() for w in words)]
        width = max((len(entry.name) for entry in kept), default=0)
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(
            Option(Content(f"{entry.name:{width}}  {entry.summary}"), id=entry.name)
            for entry in kept
        )
        options.highlighted = 0 if kept else None
