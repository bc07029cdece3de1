"""What a knob is called by the engine that ran."""

from __future__ import annotations

from typing import Any

from engines.registry import find_engine, is_engine


def option_name(knob: str, engine: str) -> str:
    """Return what an engine calls a knob; the knob's own name where it has none."""
    return find_engine(engine).option_name(knob) if is_engine(engine) else knob


def change_words(knob: str, before: Any, after: Any, engine: str) -> str:
    """Return `option before → after` as the engine spells it."""
    return f"{option_name(knob, engine)} {_plain(knob, before)} → {_plain(knob, after)}"


def _plain(knob: str, value: Any) -> str:
    if knob == "kv_cache_max_tokens" and value == 0:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)
