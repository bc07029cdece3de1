"""The use cases as functions: `plan`, `predict`, `diagnose`. Commands and TUI call these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.workloads.model import check_slo

if TYPE_CHECKING:
    from planner.diagnosis.finding import Diagnosis


def diagnose(
    run: str,
    *,
    store: str = "",
    slo: Mapping[str, float] | None = None,
    max_quality_loss_pct: float | None = None,
) -> list[Diagnosis]:
    """Return what is wrong with a measured run, and why; of a runs file, of each of its runs.

    Args:
        run: A run id of the store, a runs file, or `FILE:ID` or `FILE:LINE` for one of its runs.
        store: Where an id is looked up.
        slo: Limits that the run had to keep, by metric.
        max_quality_loss_pct: Loss that was allowed beside the published checkpoint.

    Raises:
        PlannerError: No such run or file, or an SLO on a metric that the run does not have.
    """
    from planner.diagnosis import diagnose as diagnosing  # noqa: PLC0415  only when asked

    asked = diagnosing.Asked(
        slo=check_slo(slo or {}, "--slo"), max_quality_loss_pct=max_quality_loss_pct
    )
    return diagnosing.diagnose(run, store=store, asked=asked)


def options_file(path: str | Path) -> dict[str, Any]:
    """Return the options of an engine's YAML file."""
    from cost_models.profile_io import read_yaml_object  # noqa: PLC0415

    return read_yaml_object(Path(path))
