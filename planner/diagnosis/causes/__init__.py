"""The causes that a diagnosis knows: adding one is a function here and an entry in `CAUSES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from planner.diagnosis.case import RunCase
from planner.diagnosis.causes import (
    failures,
    kernels,
    limits,
    load,
    machine,
    memory,
    prompts,
    quality,
)
from planner.diagnosis.finding import Finding

Cause = Callable[[RunCase], Finding | None]
"""Looks at a run and says whether it has this cause."""

CAUSES: Mapping[str, Cause] = {
    **memory.CAUSES,
    **failures.CAUSES,
    **limits.CAUSES,
    **prompts.CAUSES,
    **load.CAUSES,
    **kernels.CAUSES,
    **machine.CAUSES,
    **quality.CAUSES,
}
"""Every cause by its name; each function names itself so in its finding."""
