"""Reads engine profiles: `profiles/engines/*.yaml`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cost_models.engine_rules import (
    EngineRules,
    KnobRule,
    MoeBackendRule,
    PrecisionRule,
    SpeculationRule,
)
from cost_models.errors import ProfileError
from cost_models.profile_io import read_yaml_object


def list_engines() -> list[str]:
    """Return the names of the engines that are described."""
    return sorted({path.stem.split("-")[0] for path in _folder().glob("*.yaml")})


@cache
def load_engine(name: str) -> EngineRules:
    """Return the newest described version of an engine.

    Raises:
        ProfileError: Unknown engine.
    """
    paths = sorted(_folder().glob(f"{name}-*.yaml"))
    if not paths:
        raise ProfileError(
            f"engine {name!r} is unknown", hint=f"known: {', '.join(list_engines())}"
        )
    data = read_yaml_object(paths[-1])
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
    )


def _precisions(table: dict[str, dict[str, Any]]) -> dict[str, PrecisionRule]:
    return {name: PrecisionRule(**_with_tuples(rule)) for name, rule in table.items()}


def _with_tuples(rule: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in rule.items()}


def _folder() -> Path:
    return Path(str(files("profiles"))) / "engines"
