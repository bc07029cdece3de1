"""Candidates to be measured; [x] marks those that are, readable without colour."""

from __future__ import annotations

from collections.abc import Sequence

from textual.binding import Binding
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option


class CandidateList(OptionList):
    """One line a candidate; Space and Enter mark it."""

    BINDINGS = [Binding("space", "select", "Mark", show=True)]  # noqa: RUF012  Textual's form

    def __init__(self) -> None:
        super().__init__(id="candidates", compact=True)
        self.names: tuple[str, ...] = ()
        self.marked: set[int] = set()

    def show(self, names: Sequence[str], marked: int) -> None:
        """Show candidates, one of them marked."""
        self.names, self.marked = tuple(names), {marked}
        self.clear_options()
        self.add_options(Option(self._line(index)) for index in range(len(self.names)))
        self.highlighted = marked

    def mark_only(self, index: int) -> None:
        """Mark one candidate alone."""
        self.marked = {index}
        for row in range(len(self.names)):
            self.replace_option_prompt_at_index(row, self._line(row))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Mark a candidate, or take its mark away."""
        self.marked ^= {event.option_index}
        self.replace_option_prompt_at_index(event.option_index, self._line(event.option_index))

    def _line(self, index: int) -> Content:
        box = "[x]" if index in self.marked else "[ ]"
        return Content(f"{box} {self.names[index]}")
