"""What is kept between two runs: the last question, screen and theme."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from planner.files import config_folder
from planner.tui.question import Question

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where the user left off."""

    question: Question = field(default_factory=Question)
    screen: str = "plan"
    theme: str = ""
    runs_file: str = ""
    """Last file of measured runs."""
    measuring: Mapping[str, str] = field(default_factory=dict)
    """What the form of the Measure screen says, by field."""


def default_state_file() -> Path:
    """Return the file that keeps where the user left off."""
    return config_folder() / "tui.json"


def load_state(path: Path) -> tuple[State, str]:
    """Return the kept state and a notice; a broken file is ignored, and the notice says so."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _state(data), ""
    except FileNotFoundError:
        return State(), ""
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return State(), f"{path} is ignored: {reason}"


def save_state(path: Path, state: State) -> str:
    """Write the state, all or nothing; return why that failed, or nothing."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(state)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tui-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, path)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return ""


def _state(data: Any) -> State:
    if not isinstance(data, Mapping) or data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError("not a state of this version")
    asked, form = data["question"], dict(data.get("measuring", {}))
    # A field that a later version added keeps its default.
    names = [item.name for item in fields(Question) if item.name in asked]
    return State(
        question=Question(**{name: _text(asked, name) for name in names}),
        screen=_text(data, "screen"),
        theme=_text(data, "theme"),
        runs_file=_text(data, "runs_file"),
        measuring={str(name): _text(form, name) for name in form},
    )


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is not text")
    return value
