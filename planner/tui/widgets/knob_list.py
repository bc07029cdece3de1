"""Every knob with its present value; left and right go through the legal values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textual.binding import Binding
from textual.content import Content
from textual.events import Click
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

NAME_WIDTH, VALUE_WIDTH = 28, 23
"""Columns of a knob's name, and of its value between ‹ and ›."""


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

    async def _on_click(self, event: Click) -> None:
        """Step where the mouse hits ‹ or ›; elsewhere a click does what Enter does."""
        by = {NAME_WIDTH: -1, NAME_WIDTH + VALUE_WIDTH + 1: 1}.get(event.x)
        option = event.style.meta.get("option")
        if by is None or option is None:
            await super()._on_click(event)
            return
        event.prevent_default()
        self.highlighted = option
        self.action_step(by)

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
    line = Content(f"{knob:{NAME_WIDTH}}‹{spelled(value):^{VALUE_WIDTH}}›")
    if not changed:
        return line
    return line.stylize("bold") + Content(f"\n{'':{NAME_WIDTH}} was {spelled(base)}").stylize("dim")
