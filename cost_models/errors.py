"""The errors a person can cause, and the exit status of each.

PlannerError
├── ProfileError        a GPU, model, workload, calibration or run file is missing or wrong
├── ConfigError         a knob has a value that the model, GPU or engine cannot take
│   ├── UnsupportedModelError   an architecture that is not understood
│   └── SimulationStalledError  requests that would wait for ever
└── MeasurementError    hardware or an engine failed while it was being measured

"Does not fit" and "misses the SLO" are answers, not errors: see
`cost_models.memory.MemoryPlan.shortfall_bytes` and `planner.plans.plan.Plan.status`.
"""

from __future__ import annotations


class PlannerError(Exception):
    """Root of every error that this project raises on purpose.

    Args:
        message: What is wrong, with file, key and value.
        hint: What would be accepted, or the command that helps.
    """

    exit_status = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return one line: the message, then the way out."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ProfileError(PlannerError):
    """A profile, workload, calibration or run file is missing or wrong."""


class ConfigError(PlannerError):
    """A knob has a value that the model, the GPU or the engine cannot take."""


class UnsupportedModelError(ConfigError):
    """The model's architecture is not one that the cost models understand."""


class MeasurementError(PlannerError):
    """Hardware or an engine failed while it was being measured."""

    exit_status = 3


class SimulationStalledError(ConfigError):
    """A simulated engine would never come to the requests that wait for it."""
