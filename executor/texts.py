"""Reads the texts that calibrate a quantization or judge its quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cost_models.errors import ProfileError


def read_texts(path: str | Path) -> list[str]:
    """Return the documents of a file.

    A JSONL file holds one `{"text": ...}` a line, any other file one document a line.

    Raises:
        ProfileError: The file cannot be read, or holds no text.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ProfileError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{file}: not UTF-8 text") from None
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if file.suffix == ".jsonl":
        texts = [_text_of(line, f"{file}:{number}") for number, line in filled]
    else:
        texts = [line for _, line in filled]
    if not texts:
        raise ProfileError(f"{file}: holds no text", hint="one document a line, or JSONL")
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError:
        raise ProfileError(f"{where}: not JSON", hint='give {"text": ...} a line') from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ProfileError(f"{where}: holds no text", hint='give {"text": ...} a line')
    return text
