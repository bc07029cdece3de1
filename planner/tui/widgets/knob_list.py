"""Every knob with its present value; left and right go through the legal values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option


def spelled(value: Any) -> str:
    """Return a knob's value as TensorRT-LLM's YAML spells it."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"


class KnobList(OptionList):
    """One line a knob: name, value, and what the recommendation has where that differs."""

    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("left", "step(-1)", "Previous"),
        Binding("right", "step(1)", "Next"),
        Binding("backspace", "reset", "Undo"),
    ]

    @dataclass
    class Stepped(Message):
        """A knob shall take its next or previous legal value."""

        knob: str
        by: int

    @dataclass
    class ResetAsked(Message):
        """A knob shall take the recommendation's value."""

        knob: str

    @property
    def knob(self) -> str:
        """The highlighted knob."""
        if self.highlighted is None:
            return ""
        return str(self.get_option_at_index(self.highlighted).id)

    def show(
        self, knobs: Sequence[str], values: Mapping[str, Any], base: Mapping[str, Any]
    ) -> None:
        """Show the value of every knob, keeping the highlight."""
        at = self.highlighted or 0
        self.clear_options()
        self.add_options(Option(_line(k, values[k], base[k]), id=k) for k in knobs)
        self.highlighted = min(at, len(knobs) - 1)

    def update_knob(self, knob: str, value: Any, base: Any) -> None:
        """Show a knob's new value."""
        self.replace_option_prompt(knob, _line(knob, value, base))

    def action_step(self, by: int) -> None:
        """Ask for the next or previous legal value."""
        if self.knob:
            self.post_message(self.Stepped(self.knob, by))

    def action_reset(self) -> None:
        """Ask for the recommendation's value."""
        if self.knob:
            self.post_message(self.ResetAsked(self.knob))


def _line(knob: str, value: Any, base: Any) -> Content:
    changed = value != base
    line = Content(f"{knob:26}‹{spelled(value):^19}›")
    if not changed:
        return line
    return line.stylize("bold") + Content(f"\n{'':26} was {spelled(base)}").stylize("dim")
