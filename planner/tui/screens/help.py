"""The keys of a screen."""

from __future__ import annotations

from collections.abc import Iterable

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static


class HelpScreen(ModalScreen[None]):
    """What the screen below is for, and its keys."""

    BINDINGS = [("escape,question_mark,f1,enter,q", "dismiss", "Close")]  # noqa: RUF012

    def __init__(self, words: str, keys: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self.words = words
        self.keys = tuple(keys)

    def compose(self) -> ComposeResult:
        """Lay out the dialog."""
        width = max((len(key) for key, _ in self.keys), default=0)
        lines = "\n".join(f"{key:>{width}}  {words}" for key, words in self.keys)
        with Vertical(classes="dialog"):
            yield Static("Keys of this screen; Esc closes", classes="title")
            with VerticalScroll():
                yield Static(f"{self.words}\n\n{lines}", markup=False)
