"""One run with everything that is known of it: record, requests, prediction, runs beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.spelling import change_words, option_name
from planner.diagnosis.prospect import Prospect, SimulatedProspect
from planner.diagnosis.request_log import RequestLog
from planner.workloads.measured import MeasuredRun


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunCase:
    """What a diagnosis looks at."""

    record: Mapping[str, Any]
    """The run's line of a runs file."""
    run: MeasuredRun
    log: RequestLog | None
    """None where the run kept no requests."""
    prospect: Prospect | None
    not_predicted: str = ""
    """Why there is no prospect."""
    slo: Mapping[str, float] = field(default_factory=dict)
    max_quality_loss_pct: float | None = None
    """Loss that was allowed beside the published checkpoint; None is no limit."""
    siblings: Sequence[MeasuredRun] = ()
    """Other runs of the same model, GPU and engine that ended well."""

    @property
    def simulated(self) -> SimulatedProspect | None:
        """The prospect where the run's own requests were simulated."""
        return self.prospect if isinstance(self.prospect, SimulatedProspect) else None

    @property
    def status(self) -> str:
        """How the run ended; runs of old campaigns that do not say ended well."""
        return str(self.record.get("status") or "ok")

    @property
    def failed(self) -> bool:
        """Whether the run ended other than well."""
        return self.status != "ok"

    @property
    def error(self) -> str:
        """What the run's failure said, with the tail of the engine's log."""
        return str(self.record.get("error") or "")

    @property
    def measured(self) -> Mapping[str, float]:
        """Flat metrics."""
        return self.run.measured

    @property
    def machine(self) -> Mapping[str, Any]:
        """GPU, telemetry, versions, command."""
        found: Mapping[str, Any] = self.record.get("machine") or {}
        return found

    @property
    def flags(self) -> tuple[str, ...]:
        """What spoiled the run."""
        return self.run.flags

    @property
    def engine(self) -> str:
        """The engine that ran."""
        return self.run.engine

    def reading(self, name: str, statistic: str = "mean") -> float | None:
        """Return a reading of the GPU, or None where the run has none."""
        found = self.machine.get(name)
        value = found.get(statistic) if isinstance(found, Mapping) else found
        return float(value) if isinstance(value, int | float) else None

    def knob(self, name: str) -> str:
        """Return what the run's engine calls a knob."""
        return option_name(name, self.engine)

    def turn(self, name: str, before: Any, after: Any) -> str:
        """Return a turned knob in the words of the run's engine."""
        return change_words(name, before, after, self.engine)

    def log_lines(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the lines of the failure's text that match, each once."""
        lines = (line.strip() for line in self.error.splitlines())
        return list(dict.fromkeys(line for line in lines if pattern.search(line)))
