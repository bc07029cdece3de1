"""Reads an engine's options as knobs: the parts that all engines share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError

TYPES: Mapping[str, str] = {field.name: str(field.type) for field in fields(EngineConfig)}
"""The type of each knob, by name."""

ACCEPTED: Mapping[str, type | tuple[type, ...]] = {
    "bool": bool, "int": int, "float": (int, float), "str": str,
}  # fmt: skip


def typed(option: str, knob: str, value: Any) -> Any:
    """Return an option's value if it is of the knob's type.

    Raises:
        ConfigError: It is not.
    """
    kind = TYPES[knob]
    wrong_bool = isinstance(value, bool) and kind != "bool"
    if wrong_bool or not isinstance(value, ACCEPTED[kind]):
        raise ConfigError(f"option {option}={value!r}", hint=f"it must be of type {kind}")
    return value


def refuse_option(option: str, known: Iterable[str]) -> ConfigError:
    """Return the error of an option that nobody knows, with the nearest known ones."""
    close = get_close_matches(option, list(known), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else ""
    return ConfigError(f"option {option!r} is not understood", hint=hint)


def flattened(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested options by path, `kv_cache_config.dtype` style."""
    for key, value in options.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{path}.")
        else:
            yield path, value
