"""Ask for one value of a knob."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from cost_models.errors import ConfigError
from planner.knobs import parse_value


class ValueScreen(ModalScreen[str | None]):
    """Take any value of a knob's type; what is wrong is said while typing."""

    BINDINGS = [("escape", "cancel", "Cancel")]  # noqa: RUF012  Textual's form

    def __init__(self, knob: str, legal: str, present: str) -> None:
        super().__init__()
        self.knob, self.legal, self.present = knob, legal, present

    def compose(self) -> ComposeResult:
        """Lay out the dialog."""
        with Vertical(classes="dialog"):
            yield Static(f"{self.knob}: Enter takes it, Esc cancels", classes="title", markup=False)
            yield Input(self.present, compact=True, max_length=60)
            yield Static("", id="value-problem", classes="problem", markup=False)
            yield Static(f"offered: {self.legal}", markup=False)

    @on(Input.Changed)
    def check(self, event: Input.Changed) -> None:
        """Say what is wrong with the text."""
        self.query_one("#value-problem", Static).update(self._problem(event.value))

    @on(Input.Submitted)
    def submit(self, event: Input.Submitted) -> None:
        """Take the value if it can be read."""
        if not self._problem(event.value):
            self.dismiss(event.value.strip())

    def action_cancel(self) -> None:
        """Leave the knob as it is."""
        self.dismiss(None)

    def _problem(self, text: str) -> str:
        try:
            parse_value(self.knob, text)
        except ConfigError as error:
            return f"✗ {error}"
        return ""
