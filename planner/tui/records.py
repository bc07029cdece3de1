"""What stands in the table of the Runs screen: a measured run, or a plan from its plan.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_models.errors import ProfileError
from cost_models.profile_io import read_json_object
from planner.tui.text import number

if TYPE_CHECKING:
    from planner.validation.validate import Row

OVERVIEW = (
    ("TPOT ms", "tpot_ms.mean"),
    ("TTFT ms", "ttft_ms.mean"),
    ("tok/s/GPU", "output_tok_per_s_per_gpu"),
)
"""(title, metric) of the table."""


NOTHING_MEASURED = (("nothing to compare: d says why",),)
"""Instead of metrics, of a run that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of the table, with everything behind it."""

    name: str
    cells: tuple[str, ...]
    """In the order of `OVERVIEW`, then model and GPU."""
    columns: tuple[str, ...]
    """Titles of the values of `lines`."""
    lines: tuple[tuple[str, ...], ...]
    """Name and values of each metric or knob."""
    compared: Mapping[str, str]
    """What is set against another record: knobs, load, and metrics as measured, else predicted."""
    content: Mapping[str, Any]
    """The whole record, as JSON values."""
    is_run: bool = True
    """Whether it was measured; else it is a plan."""


def record_of_run(row: Row) -> Record:
    """Return a measured run beside its prediction."""
    run = row.run
    content = asdict(run) | {"folder": str(run.folder)}
    content |= {"predicted": dict(row.predicted), "interval_90": dict(row.intervals)}
    return Record(
        name=run.run_id,
        cells=(*(_pair(row, metric) for _, metric in OVERVIEW), run.model, run.gpu),
        columns=("predicted", "measured", "error", "90 %"),
        lines=tuple(_run_line(row, metric) for metric in row.scored()) or NOTHING_MEASURED,
        compared={
            **{name: str(value) for name, value in run.config.items()},
            **{name: str(value) for name, value in run.workload.items()},
            **{name: number(run.measured[name]) for name in row.scored()},
        },
        content=content,
    )


def record_of_skipped(run_id: str, reason: str) -> Record:
    """Return a run that cannot be set beside a prediction: it failed, or cannot be read."""
    return Record(
        name=run_id,
        cells=(*("–" for _ in OVERVIEW), "not predicted", ""),
        columns=("why",),
        lines=(("not predicted", reason),),
        compared={},
        content={"run_id": run_id, "not_predicted": reason},
    )


def record_of_plan(path: Path) -> Record:
    """Return what a plan.json recommends.

    Raises:
        ProfileError: It cannot be read, or is not a plan.
    """
    content = read_json_object(path)
    try:
        best = content["recommended"]
        predicted, config = best["predicted"], best["config"]
        metrics = tuple(_plan_line(name, predicted[name]) for name in predicted)
        overview = tuple(number(predicted[metric]["value"]) for _, metric in OVERVIEW)
    except (KeyError, TypeError) as error:
        raise ProfileError(f"{path}: not a plan ({error!r})") from None
    knobs = tuple((name, str(value), "") for name, value in config.items())
    return Record(
        name=str(path),
        cells=(*overview, f"plan, {content['status']}", str(content["objective"])),
        columns=("value", "90 % interval"),
        lines=(*metrics, *knobs),
        compared={line[0]: line[1] for line in (*knobs, *metrics)},
        content=content,
        is_run=False,
    )


def differing(first: Record, second: Record) -> tuple[tuple[str, str, str, str], ...]:
    """Return in what two records differ: name, both values, change in percent."""
    one, two = first.compared, second.compared
    names = [name for name in one if name in two and one[name] != two[name]]
    return tuple((name, one[name], two[name], _change(one[name], two[name])) for name in names)


def _change(before: str, after: str) -> str:
    try:
        a, b = (float(text.replace(",", "")) for text in (before, after))
    except ValueError:
        return ""
    return f"{100 * (b / a - 1):+.1f} %" if a else ""


def _pair(row: Row, metric: str) -> str:
    """Return a metric as predicted and as measured, each GPU's share where runs know the whole."""
    share = 1
    if metric not in row.run.measured and metric.endswith("_per_gpu"):
        metric, share = metric.removesuffix("_per_gpu"), row.run.num_gpus
    if metric not in row.predicted or metric not in row.run.measured:
        return "–"
    return f"{number(row.predicted[metric] / share)} / {number(row.run.measured[metric] / share)}"


def _run_line(row: Row, metric: str) -> tuple[str, ...]:
    predicted, measured = row.predicted[metric], row.run.measured[metric]
    low, high = row.intervals[metric]
    inside = "inside" if low <= measured <= high else "outside"
    error = f"{100 * (predicted / measured - 1):+.1f} %"
    return metric, number(predicted), number(measured), error, inside


def _plan_line(name: str, said: Mapping[str, Any]) -> tuple[str, ...]:
    bounds: Sequence[float | None] = said["interval_90"]
    shown = ["–" if bound is None else number(bound) for bound in bounds]
    value = said["value"]
    return name, "–" if value is None else number(value), f"{shown[0]} to {shown[1]}"
