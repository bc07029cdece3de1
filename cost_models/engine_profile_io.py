"""Reads engine profiles: `<engine>-<version>.yaml`, what one version of an engine can deploy."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from cost_models.engine_rules import (
    EngineRules,
    KnobRule,
    MoeBackendRule,
    PrecisionRule,
    SpeculationRule,
)
from cost_models.errors import ProfileError
from cost_models.profile_io import read_yaml_object


def newest_profile(folder: Path, name: str) -> Path:
    """Return the file of the newest version of an engine that a folder describes.

    Raises:
        ProfileError: The folder describes none, or a file's name holds no version.
    """
    pattern = re.compile(rf"{re.escape(name)}-(\d.*)")
    found = {
        path: match[1] for path in folder.glob("*.yaml") if (match := pattern.fullmatch(path.stem))
    }
    if not found:
        raise ProfileError(f"engine {name!r}: {folder} holds no profile {name}-VERSION.yaml")
    return max(found, key=lambda path: _version(path, found[path]))


@cache
def read_rules(path: Path) -> EngineRules:
    """Return what an engine profile says.

    Raises:
        ProfileError: The file cannot be read, or lacks a key.
    """
    data = read_yaml_object(path)
    try:
        return _rules(data)
    except (KeyError, TypeError) as error:
        raise ProfileError(f"{path}: not an engine profile ({error})") from None


def _rules(data: dict[str, Any]) -> EngineRules:
    return EngineRules(
        name=data["name"],
        title=data["title"],
        version=data["version"],
        quantizations=_precisions(data["quantizations"]),
        kv_cache_dtypes=_precisions(data["kv_cache_dtypes"]),
        knobs={knob: KnobRule(**_with_tuples(rule)) for knob, rule in data["knobs"].items()},
        moe_backends=tuple(
            MoeBackendRule(**_with_tuples(rule)) for rule in data.get("moe_backends", ())
        ),
        speculation={
            name: SpeculationRule(**_with_tuples(rule))
            for name, rule in data.get("speculation", {}).items()
        },
        spreads_experts_over_all_ranks=data.get("spreads_experts_over_all_ranks", False),
    )


def _version(path: Path, text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise ProfileError(
            f"{path}: {text!r} is not a version", hint="name it ENGINE-VERSION.yaml, as x-1.2.yaml"
        ) from None


def _precisions(table: dict[str, dict[str, Any]]) -> dict[str, PrecisionRule]:
    return {name: PrecisionRule(**_with_tuples(rule)) for name, rule in table.items()}


def _with_tuples(rule: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in rule.items()}
