"""Reads knobs as people write them: `--set knob=value`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from cost_models.deployment import ALL_KNOBS, DEPLOYMENT_KNOBS, ROUTERS, Deployment
from cost_models.engine import EngineConfig
from cost_models.engine_rules import check_values
from cost_models.errors import ConfigError
from engines.reading import TYPES as ENGINE_TYPES

TYPES: Mapping[str, str] = {"num_servers": "int", "router": "str", **ENGINE_TYPES}

OTHER_NAMES: Mapping[str, str] = {"num_replicas": "num_servers"}
"""Knobs under a name that people use too: each server runs one replica of the model."""

MOST_SERVERS = 4096


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


def apply_settings(deployment: Deployment, settings: Mapping[str, str]) -> Deployment:
    """Return the deployment with knobs set from text.

    Raises:
        ConfigError: Unknown knob, or a value that it cannot take.
    """
    values = {known_knob(knob): parse_value(knob, text) for knob, text in settings.items()}
    changed = deployment.with_knobs(**values)
    _check_knobs(values)
    check_values(changed.config)
    return changed


def apply_engine_settings(config: EngineConfig, settings: Mapping[str, str]) -> EngineConfig:
    """Return an engine configuration with knobs set from text.

    Raises:
        ConfigError: Unknown knob, a value that it cannot take, or a knob of the deployment.
    """
    values = {known_knob(knob): parse_value(knob, text) for knob, text in settings.items()}
    for knob in DEPLOYMENT_KNOBS:
        if knob in values:
            raise ConfigError(
                f"{knob} is a knob of a deployment", hint="one server alone is measured here"
            )
    changed = replace(config, **values)
    check_values(changed)
    return changed


def _check_knobs(values: Mapping[str, Any]) -> None:
    """Refuse what no deployment takes.

    Raises:
        ConfigError: A number of servers or a router that there is not.
    """
    num_servers, router = values.get("num_servers", 1), values.get("router", ROUTERS[0])
    if not 1 <= num_servers <= MOST_SERVERS:
        raise ConfigError(f"num_servers={num_servers}", hint=f"accepted: 1 to {MOST_SERVERS}")
    if router not in ROUTERS:
        raise ConfigError(f"router={router!r}", hint=f"known: {', '.join(ROUTERS)}")


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
            _check_knobs({knob: value})
            if knob not in DEPLOYMENT_KNOBS:
                check_values(replace(EngineConfig(), **{knob: value}))
    return allowed


def known_knob(knob: str) -> str:
    """Return the knob's name.

    Raises:
        ConfigError: Unknown, with the nearest known ones.
    """
    knob = OTHER_NAMES.get(knob, knob)
    if knob in ALL_KNOBS:
        return knob
    close = get_close_matches(knob, ALL_KNOBS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(ALL_KNOBS)}"
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
