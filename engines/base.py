"""The contract of a serving engine: what `engines.registry` hands to planner and executor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.engine_profile_io import newest_profile, read_rules
from cost_models.engine_rules import EngineRules
from cost_models.engine_traits import EngineTraits
from cost_models.gpu import GpuSpec
from cost_models.model import ModelSpec

SHIPPED_PROFILES = Path(str(files("profiles"))) / "engines"
"""Where the profiles of the engines in this package lie."""

SHIPPED_CONSTANTS = Path(str(files("profiles"))) / "calibrations" / "engines"
"""Where their constants lie, as `<name>.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledLoad:
    """A sample of a workload, from which an engine's own benchmark takes its requests."""

    isl: Sequence[int]
    osl: Sequence[int]
    concurrency: int
    """Clients of the whole deployment; 0 where requests arrive by themselves."""
    rng: np.random.Generator
    """Draws the token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLoad:
    """What a measured run served, from which the limits that it does not state are derived."""

    model: ModelSpec
    gpu: GpuSpec
    mean_isl: float
    mean_osl: float
    longest_isl: float
    """The tokens of the longest prompt; 0 of a run that served none."""
    concurrency: float
    """Clients of a closed loop; 0 otherwise."""
    is_offline: bool
    """Whether all requests were there from the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFiles:
    """What a backend hands to the engine beside its command line."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Content of the engine's options file; empty where it reads none."""
    build_script: str = ""
    """Makes the checkpoint; empty where the published one will do."""


def _no_launch_files(
    _config: EngineConfig, _model: ModelSpec, _asked: Mapping[str, str]
) -> LaunchFiles:
    return LaunchFiles()


def _no_plan_files(
    _deployment: Deployment, _model: ModelSpec, _load: SampledLoad
) -> Mapping[str, str]:
    return {}


def _as_stated(config: EngineConfig, _stated: Collection[str], _load: MeasuredLoad) -> EngineConfig:
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """All that is an engine's own, as values and functions; nobody else compares its name.

    A new engine is one object of this class. Its package names it under the entry-point group
    `planner.engines`, as `acme = "acme_engine:SPEC"`. It must supply:

    1. `traits`, which hold its name: how it divides memory, captures graphs, pads drafts, cuts
       prompts into chunks and reuses blocks.
    2. A profile `<name>-<version>.yaml` in the folder `profiles`: the precisions by GPU, the legal
       values of its knobs, the ways to draft. A knob with one legal value is one that the engine
       cannot be told: another value is refused. Every other knob must be sent by `options`.
    3. `constants`, a calibration file: the times of its host and front end, and its memory.
    4. `defaults`: the knobs whose values without any option differ from those of `EngineConfig`.
    5. `options`: a configuration as options of the engine.
    6. `read_options`: options, from a file, as a configuration. Reading what `options` returns
       gives the configuration back, but for knobs that do nothing in it.

    It may supply:

    7. `option_names`: what it calls each knob, for reports.
    8. `made_at_load`: precisions that it makes of a BF16 checkpoint by itself.
    9. `loads`: the built checkpoints that it loads, with the source that says so.
    10. `queue_orders`: how orders of the queue beside first come, first served are turned on.
    11. `front_end_option`: what takes work off the process that also schedules.
    12. `plan_files` with their names: the files that deploy a plan.
    13. `launch_files`: what `executor` hands to it at a launch.
    14. `with_unstated_limits`: the limits that a measured run had without stating them.

    To be measured it also needs a backend (`executor.backend`), under `planner.backends`.
    """

    traits: EngineTraits
    profiles: Path = SHIPPED_PROFILES
    """The folder of its profiles; the newest version counts."""
    constants: Path
    """Its calibration file."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Knobs without an option, where `EngineConfig` has another value."""
    options: Callable[[EngineConfig, ModelSpec], Mapping[str, Any]]
    """Its options for a configuration of a model."""
    read_options: Callable[[Mapping[str, Any], EngineConfig], tuple[EngineConfig, list[str]]]
    """The configuration that options make of a base, and the options that change nothing.

    What it does not understand is a `ConfigError`.
    """
    option_names: Mapping[str, str] = field(default_factory=dict)
    """Its name of each knob; the knob's own where there is none."""
    made_at_load: Mapping[str, str] = field(default_factory=dict)
    """The quantization that it computes in, by the one that it is asked for."""
    loads: Mapping[str, str] = field(default_factory=dict)
    """Where its loading code stands, by the scheme of the checkpoint."""
    queue_orders: Mapping[str, str] = field(default_factory=dict)
    """How it is told, by `queue_order`."""
    front_end_option: str = ""
    """The option that adds processes to its front end."""
    plan_file_names: tuple[str, ...] = ()
    """Every file that `plan_files` may write."""
    plan_files: Callable[[Deployment, ModelSpec, SampledLoad], Mapping[str, str]] = _no_plan_files
    """The text of each file that deploys a plan."""
    launch_files: Callable[[EngineConfig, ModelSpec, Mapping[str, str]], LaunchFiles] = (
        _no_launch_files
    )
    """What a launch needs beside a command line, under the options of a backend."""
    with_unstated_limits: Callable[[EngineConfig, Collection[str], MeasuredLoad], EngineConfig] = (
        _as_stated
    )
    """The configuration of a run that states some knobs."""

    @property
    def name(self) -> str:
        """The name of the engine in runs, calibrations and `--engine`."""
        return self.traits.name

    @property
    def rules(self) -> EngineRules:
        """What its newest described version can deploy."""
        return read_rules(newest_profile(self.profiles, self.name))

    def option_name(self, knob: str) -> str:
        """Return what the engine calls a knob."""
        return self.option_names.get(knob, knob)

    def as_run(self, config: EngineConfig) -> EngineConfig:
        """Return a configuration with the quantization that the engine computes in."""
        computed = self.made_at_load.get(config.quantization, config.quantization)
        return replace(config, quantization=computed)
