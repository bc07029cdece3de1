"""What is measured and how: cases, limits, and what a measurement works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from executor.backend import Backend, Launch
from executor.load_generator import TimeLimits
from executor.machine import GpuReader
from executor.observe import Observe
from executor.repeats import RepeatRule
from executor.store import RunStore, resume_key
from executor.traffic import Traffic

Progress = Callable[[str, float], None]
"""Told what begins now, and how many seconds are left of the time budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseLimits:
    """How long each phase may take; seconds."""

    prepare_s: float = 3600.0
    start_s: float = 900.0
    warm_up_s: float = 300.0
    run_s: float = 1800.0
    request_s: float = 600.0
    silence_s: float = 120.0
    free_memory_s: float = 60.0

    def of_load(self, run_s: float) -> TimeLimits:
        """Return the limits of one load that may take so long."""
        return TimeLimits(run_s=run_s, silence_s=self.silence_s, request_s=self.request_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How to measure."""

    limits: PhaseLimits = field(default_factory=PhaseLimits)
    rule: RepeatRule = field(default_factory=RepeatRule)
    time_budget_s: float = 600.0
    """For one case; the repeats end when it is spent."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration under one workload."""

    deployment: Launch
    traffic: Traffic
    gpu: str
    """Profile name, as runs give it."""
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def key(self, backend: Backend) -> str:
        """Return what finds the runs of the same question again."""
        deployment, traffic = self.deployment, self.traffic
        return resume_key(
            {"backend": backend.name, "version": backend.availability().version},
            {"gpu": self.gpu, "model": deployment.model.name},
            {"random_weights": deployment.model.has_random_weights},
            asdict(deployment.config),
            dict(deployment.options),
            dict(traffic.workload),
            {"isl": list(traffic.isl), "osl": list(traffic.osl)},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The runs of one case, those of earlier campaigns first."""

    key: str
    records: tuple[Mapping[str, Any], ...]
    """Lines of a runs file, good ones and failures."""
    num_resumed: int = 0
    """Runs that had been stored before."""

    @property
    def measured(self) -> list[Mapping[str, Any]]:
        """The `measured` sections of the runs that ended well."""
        return [record["measured"] for record in self.records if record["status"] == "ok"]

    @property
    def is_ok(self) -> bool:
        """Whether anything was measured and nothing failed."""
        return bool(self.records) and all(record["status"] == "ok" for record in self.records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a measurement works with."""

    backend: Backend
    store: RunStore
    reader: GpuReader
    options: MeasureOptions = field(default_factory=MeasureOptions)
    progress: Progress = lambda _what, _left_s: None
    observe: Observe | None = None
    """Told twice a second what can be seen; from a thread beside the measurement."""
