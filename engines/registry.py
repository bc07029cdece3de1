"""Engines by name. Each is loaded when it is first asked for, also one of another package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from cost_models.calibration import Calibration
from cost_models.calibration_io import read_calibration, read_constants
from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError, ProfileError
from cost_models.gpu import GpuSpec
from engines.base import EngineSpec

ENTRY_POINTS = "planner.engines"
"""The entry-point group under which another package adds an engine."""

SHIPPED: Mapping[str, EntryPoint] = {
    name: EntryPoint(name=name, value=f"engines.{name}:SPEC", group=ENTRY_POINTS)
    for name in ("trtllm", "vllm")
}
"""The engines of this package; none that is installed beside it replaces one."""

DEFAULT_ENGINE = "trtllm"
"""The engine where nobody names one: knobs have its names."""


def list_engines() -> list[str]:
    """Return the names of all engines; none is loaded."""
    return sorted(_points())


def is_engine(name: str) -> bool:
    """Whether an engine of that name is described."""
    return name in SHIPPED or name in _points()


@cache
def find_engine(name: str) -> EngineSpec:
    """Return an engine by name.

    Raises:
        ProfileError: Unknown engine.
        ConfigError: Its package cannot be loaded, or holds something else.
    """
    points = SHIPPED if name in SHIPPED else _points()
    if name not in points:
        raise ProfileError(
            f"engine {name!r} is unknown", hint=f"known: {', '.join(list_engines())}"
        )
    point = points[name]
    try:
        spec = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"engine {name!r} cannot be loaded ({error})") from error
    if not isinstance(spec, EngineSpec) or spec.name != name:
        raise ConfigError(f"engine {name!r}: {point.value} is not its EngineSpec")
    return spec


def defaults_of(engine: str) -> Mapping[str, Any]:
    """Return what an engine does when nobody says; nothing is known of one without a spec."""
    return find_engine(engine).defaults if is_engine(engine) else {}


def as_run(config: EngineConfig, engine: str) -> EngineConfig:
    """Return a configuration in the planner's terms where an engine's are others."""
    return find_engine(engine).as_run(config) if is_engine(engine) else config


def load_calibration(
    gpu: GpuSpec,
    engine: str = DEFAULT_ENGINE,
    own: Sequence[str | Path] = (),
    *,
    engine_version: str = "",
) -> Calibration:
    """Return what is known of an engine on a GPU: datasheet, then shipped, then the user's files.

    Args:
        gpu: Where the engine runs.
        engine: Its name.
        own: Calibration files of the user's own, laid over the shipped ones in this order.
        engine_version: Takes the constants that are known to differ in that version.

    Raises:
        PlannerError: The engine is unknown, or a file cannot be read or is of another GPU or
            engine.
    """
    spec = find_engine(engine)
    return read_calibration(gpu, spec.traits, spec.constants, own, engine_version=engine_version)


def engine_constants(engine: str) -> dict[str, Any]:
    """Return the content of an engine's shipped calibration file.

    Raises:
        PlannerError: The engine is unknown, or its file cannot be read.
    """
    return read_constants(find_engine(engine).constants)


def _points() -> Mapping[str, EntryPoint]:
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    return {**found, **SHIPPED}
