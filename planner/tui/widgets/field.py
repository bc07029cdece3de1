"""One line of a form: label, input, and what is wrong with it in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.events import Click
from textual.widgets import Input, Static

from planner.tui.catalogue import Entry
from planner.tui.screens.pick import PickScreen
from planner.tui.widgets.text_input import TextInput


class Field(Vertical):
    """A labelled input; with `choices` a list opens on the down key or on ▾.

    Below stands what is wrong with the text or, where the input is too narrow for it and has the
    keyboard, the whole text.
    """

    def __init__(
        self,
        name: str,
        label: str,
        *,
        value: str = "",
        placeholder: str = "",
        choices: Callable[[], Sequence[Entry]] | None = None,
    ) -> None:
        super().__init__(id=f"field-{name}", classes="field")
        self.field_name = name
        self.label = label
        self.choices = choices
        self.input = _FieldInput(value, placeholder, name, self)
        self._problem = self._below = ""

    def compose(self) -> ComposeResult:
        """Lay out the input and the line below it."""
        yield self.input
        yield Static("", classes="below", markup=False)

    def render(self) -> Content:
        """Draw label and mark around the input: no widgets of their own, for the first paint."""
        mark = "▾" if self.choices else ""
        return Content(f"{self.label:{max(self.size.width - 1, 0)}}{mark}")

    def on_mount(self) -> None:
        """Hide the line below until it says something."""
        self.query_one(".below").display = False

    def show_problem(self, words: str) -> None:
        """Show what is wrong at the field, or nothing."""
        self._problem = words
        self.set_class(bool(words), "-wrong")
        self._say_below()

    def on_click(self, event: Click) -> None:
        """Open the list where the mouse hits its mark."""
        if event.widget is self and event.x >= self.size.width - 2:
            self.open_choices()

    def open_choices(self) -> None:
        """Open the list of what is shipped, if the field has one."""
        if self.choices is not None:
            self.app.push_screen(PickScreen(self.label, self.choices()), self._picked)

    @on(Input.Changed)
    @on(Input.Blurred)
    def _say_below(self) -> None:
        text = self.input.value or self.input.placeholder
        is_cut = self.input.has_focus and len(text) >= self.input.size.width
        words = f"✗ {self._problem}" if self._problem else text if is_cut else ""
        if words != self._below:  # each change lays the form out anew: not at every keystroke
            self._below = words
            below = self.query_one(".below", Static)
            below.update(words)
            below.display = bool(words)

    def on_descendant_focus(self) -> None:
        """Show the whole text of an input that is too narrow for it."""
        self._say_below()

    def _picked(self, value: str | None) -> None:
        if value is not None:
            self.input.value = value
        self.input.focus()


class _FieldInput(TextInput):
    """An input whose down key opens its field's list."""

    BINDINGS = [("down", "choices", "List")]  # noqa: RUF012  Textual's form

    def __init__(self, value: str, placeholder: str, name: str, field: Field) -> None:
        super().__init__(value, placeholder=placeholder, name=name, compact=True, max_length=400)
        self.field = field

    def action_choices(self) -> None:
        """Open the list."""
        self.field.open_choices()
