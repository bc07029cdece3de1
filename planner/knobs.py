"""Reads knobs as people write them: `--set knob=value`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from cost_models.engine import KNOBS, EngineConfig
from cost_models.engine_rules import check_values
from cost_models.errors import ConfigError
from engines.reading import TYPES


def parse_assignments(texts: Iterable[str], option: str) -> dict[str, str]:
    """Split `knob=value` texts.

    Raises:
        ConfigError: A text has no `=`, or a knob comes twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        knob, equals, value = text.partition("=")
        if not equals or not knob or not value:
            raise ConfigError(f"{option} {text!r} is not knob=value")
        if knob in pairs:
            raise ConfigError(f"{option} {knob} is given twice")
        pairs[knob] = value
    return pairs


def apply_settings(config: EngineConfig, settings: Mapping[str, str]) -> EngineConfig:
    """Return the configuration with knobs set from text.

    Raises:
        ConfigError: Unknown knob, or a value that it cannot take.
    """
    values = {known_knob(knob): parse_value(knob, text) for knob, text in settings.items()}
    changed = replace(config, **values)
    check_values(changed)
    return changed


def parse_limits(pins: Mapping[str, str], limits: Mapping[str, str]) -> dict[str, tuple[Any, ...]]:
    """Return the values that `--pin` and `--limit` leave to each knob.

    Raises:
        ConfigError: Unknown knob, wrong value, or a knob both pinned and limited.
    """
    both = set(pins) & set(limits)
    if both:
        raise ConfigError(f"{sorted(both)[0]} is given by --pin and by --limit")
    allowed: dict[str, tuple[Any, ...]] = {
        known_knob(knob): (parse_value(knob, text),) for knob, text in pins.items()
    }
    for knob, text in limits.items():
        distinct = dict.fromkeys(parse_value(knob, part) for part in text.split(","))
        allowed[known_knob(knob)] = tuple(distinct)
    for knob, values in allowed.items():
        for value in values:
            check_values(replace(EngineConfig(), **{knob: value}))
    return allowed


def known_knob(knob: str) -> str:
    """Return the knob's name.

    Raises:
        ConfigError: Unknown, with the nearest known ones.
    """
    if knob in KNOBS:
        return knob
    close = get_close_matches(knob, KNOBS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(KNOBS)}"
    raise ConfigError(f"knob {knob!r} is unknown", hint=hint)


def parse_value(knob: str, text: str) -> Any:
    """Return a knob's value from text.

    Raises:
        ConfigError: The text is not of the knob's type.
    """
    kind = TYPES[known_knob(knob)]
    try:
        if kind == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[text.strip().lower()]
        if kind == "int":
            return int(text)
        if kind == "float":
            return _finite(text)
    except (KeyError, ValueError):
        names = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        raise ConfigError(f"{knob}={text!r}", hint=f"it must be {names[kind]}") from None
    return text.strip()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
