"""A line of text to be typed on a main screen."""

from __future__ import annotations

from textual.widgets import Input


class TextInput(Input):
    """An input that leaves ? to the application: nothing typed here needs it, and it shows keys."""

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Take printable keys but ?."""
        return character != "?" and super().check_consume_key(key, character)
