"""One whole record over the screen, and where to write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from planner.files import write_text


class RecordScreen(ModalScreen[None]):
    """A record as JSON, to be read."""

    BINDINGS = [("escape,q", "dismiss", "Close")]  # noqa: RUF012  Textual's form

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        super().__init__()
        self.heading, self.content = name, content

    def compose(self) -> ComposeResult:
        """Lay out the dialog."""
        with Vertical(classes="dialog record"):
            yield Static(f"{self.heading}; Esc closes", classes="title", markup=False)
            with VerticalScroll():
                yield Static(json.dumps(self.content, indent=1, default=str), markup=False)

    def on_mount(self) -> None:
        """Let the arrow keys scroll."""
        self.query_one(VerticalScroll).focus()


class ExportRecordsScreen(ModalScreen[None]):
    """Ask for a file and write records there as a JSON list."""

    BINDINGS = [("escape", "dismiss", "Cancel")]  # noqa: RUF012  Textual's form

    def __init__(self, contents: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.contents = tuple(contents)

    def compose(self) -> ComposeResult:
        """Lay out the dialog."""
        with Vertical(classes="dialog"):
            yield Static("Export what is shown: Enter writes, Esc cancels", classes="title")
            yield Input("records.json", placeholder="file", compact=True)
            yield Static("", id="export-problem", classes="problem", markup=False)

    @on(Input.Submitted)
    def submit(self, event: Input.Submitted) -> None:
        """Write, unless the file is there already."""
        path = Path(event.value.strip()).expanduser()
        problem = "name a file" if not event.value.strip() else ""
        if path.exists() and event.value.strip():
            problem = f"{path} exists; name another file"
        if not problem:
            try:
                write_text(path, json.dumps(self.contents, indent=1, default=str) + "\n")
            except OSError as error:
                problem = f"{path} cannot be written: {error.strerror}"
        if problem:
            self.query_one("#export-problem", Static).update(f"✗ {problem}")
        else:
            self.app.notify(f"Written to {path.resolve()}", markup=False)
            self.dismiss()
