"""Where the user's files are kept, and how they are written: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def config_folder() -> Path:
    """Return where the platform keeps this program's configuration."""
    from platformdirs import user_config_path  # noqa: PLC0415  help must not wait

    return user_config_path("trtllm-planner", appauthor=False)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there; make its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
