"""The report's tables: titles, columns and rows of text and numbers, rounded as they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cost_models.calibration import Calibration
from planner.validation.report.detail import Detail
from planner.validation.validate import MetricError, Row, Validation, errors_by_metric
from planner.workloads.load import Load

Cell = str | int | float

HEADLINES: Mapping[str, str] = {
    "ttft_ms.mean": "TTFT mean, ms",
    "ttft_ms.p50": "TTFT P50, ms",
    "ttft_ms.p99": "TTFT P99, ms",
    "tpot_ms.mean": "TPOT mean, ms",
    "tpot_ms.p99": "TPOT P99, ms",
    "itl_ms.p99": "ITL P99, ms",
    "e2el_ms.p50": "E2E P50, ms",
    "e2el_ms.p99": "E2E P99, ms",
    "output_tok_per_s": "output tokens/s",
    "kv_cache_tokens": "KV cache, tokens",
    "max_sequences": "KV cache, sequences",
}
"""Metrics that the report shows one by one, by what they are called there."""

RATES = frozenset({"output_tok_per_s"})
"""Headline metrics that fall where time grows."""

CLIENT_BOUNDS = (16, 64)
"""Clients up to which a closed loop is light, and up to which it is medium."""

ERROR_COLUMNS = ("n", "MAPE %", "median %", "bias %", "in interval %", "interval width %")

ERROR_FIELDS = tuple(MetricError.__dataclass_fields__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table; its rows hold what is shown, so that every form of the report says the same."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "name": self.name,
            "title": self.title,
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
        }


def load_regime(row: Row) -> str:
    """Return what kind of load a run is: how requests come, and how near it is to capacity."""
    run = row.run
    if run.protocol != "closed_loop":
        return row.regime.replace("_", " ")
    clients, (light, medium) = float(run.workload["concurrency"]), CLIENT_BOUNDS
    if clients <= light:
        return f"closed loop, up to {light} clients"
    if clients <= medium:
        return f"closed loop, {light + 1} to {medium} clients"
    return f"closed loop, above {medium} clients"


def load_regimes(rows: Sequence[Row]) -> list[str]:
    """Return the load regimes of some runs, light loads before heavy ones."""

    def order(row: Row) -> tuple[str, float]:
        return row.regime, float(row.run.workload.get("concurrency") or 0.0)

    return list(dict.fromkeys(load_regime(row) for row in sorted(rows, key=order)))


def overall_errors(validation: Validation) -> Table:
    """Every metric over all runs."""
    return Table(
        name="overall",
        title="Error over all runs",
        columns=("metric", *ERROR_COLUMNS),
        rows=tuple((name, *_errors(e)) for name, e in validation.overall.items()),
        note="MAPE: mean absolute error in percent of the measurement. Bias above 0: predicted "
        "too high. In interval: measurements inside the 90 % interval.",
    )


def group_errors(validation: Validation) -> Table:
    """Headline metrics by GPU, engine and model."""
    return Table(
        name="by_model",
        title="Error by GPU, engine and model",
        columns=("GPU", "engine", "model", "metric", *ERROR_COLUMNS),
        rows=tuple(
            (group.gpu, group.engine, group.model, *line)
            for group in validation.groups
            for line in _headline_errors(group.metrics)
        ),
    )


def regime_errors(validation: Validation) -> Table:
    """Headline metrics by load regime."""
    regimes = load_regimes(validation.rows)
    return Table(
        name="by_regime",
        title="Error by load regime",
        columns=("load", "metric", *ERROR_COLUMNS),
        rows=tuple(
            (regime, *line)
            for regime in regimes
            for line in _headline_errors(
                errors_by_metric(r for r in validation.rows if load_regime(r) == regime)
            )
        ),
    )


def predicted_beside_measured(validation: Validation) -> Table:
    """Headline metrics run by run, with intervals."""
    return Table(
        name="runs",
        title="Predicted against measured, run by run",
        columns=("run", "metric", "measured", "predicted", "from", "to", "error %", "inside"),
        rows=tuple(
            (row.run.run_id, HEADLINES[name], *_beside(row, name))
            for row in validation.rows
            for name in scored_headlines(row)
        ),
        note="From and to are the ends of the 90 % interval.",
    )


def worst_cases(cases: Sequence[tuple[Row, str, Detail | None]]) -> Table:
    """The runs that are furthest off in each metric, with what takes their time."""
    return Table(
        name="worst",
        title="Worst cases",
        columns=(
            "metric", "run", "load", "measured", "predicted", "error %", "inside",
            "largest operators", "blamed", "blamed: needed factor",
        ),
        rows=tuple(_worst_case(row, name, detail) for row, name, detail in cases),
        note="Largest operators: shares of the simulated run's step time; of a step with prompts "
        "for TTFT and tails of ITL. Blamed is the largest, with the factor by which its time would "
        "have to change to explain the whole error alone: far from 1, or none, something else is "
        "wrong. TTFT waits in queues too, so it has no factor.",
    )  # fmt: skip


def calibration_range(
    validation: Validation, calibrations: Sequence[tuple[str, Calibration]]
) -> Table:
    """What the constants rest on, and the range that these runs cover."""
    runs = [row.run for row in validation.rows]
    rows: list[tuple[Cell, ...]] = [
        (f"calibration of {name}", str(c.provenance), "; ".join(c.sources) or "not stated")
        for name, c in calibrations
    ]
    rows += [
        (f"borrowed by {name}", len(c.borrowed), ", ".join(sorted(c.borrowed)))
        for name, c in calibrations
        if c.borrowed
    ]
    loads = [run.load() for run in runs if run.protocol != "capacity"]
    rows += [("runs", len(runs), "; ".join(load_regimes(validation.rows)))]
    rows += [("engine versions", *_listed(f"{r.engine} {r.engine_version}" for r in runs))]
    rows += [("quantizations", *_listed(str(r.config.get("quantization", "–")) for r in runs))]
    rows += [(name, "", f"{low:g} to {high:g}") for name, low, high in _ranges(loads)]
    return Table(
        name="range", title="Calibration range", columns=("what", "", "covered"), rows=tuple(rows),
        note="Errors on runs on which a calibration was fitted flatter it.",
    )  # fmt: skip


def skipped_runs(validation: Validation) -> Table:
    """Runs that could not be predicted."""
    return Table(
        name="skipped",
        title="Runs left out",
        columns=("run", "reason"),
        rows=validation.skipped,
    )


def scored_headlines(row: Row) -> Iterator[str]:
    """Yield the headline metrics on which a run can be judged, in the report's order."""
    scored = set(row.scored())
    return (name for name in HEADLINES if name in scored)


def error_pct(row: Row, name: str) -> float:
    """Return predicted over measured, less 1, in percent."""
    return 100 * (row.predicted[name] / row.run.measured[name] - 1)


def shown(value: float) -> float:
    """Round to four significant digits, integers whole."""
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def _errors(error: MetricError) -> tuple[Cell, ...]:
    return (error.n, *(round(getattr(error, name), 1) for name in ERROR_FIELDS[1:]))


def _headline_errors(metrics: Mapping[str, MetricError]) -> Iterator[tuple[Cell, ...]]:
    for name, title in HEADLINES.items():
        if name in metrics:
            yield (title, *_errors(metrics[name]))


def _beside(row: Row, name: str) -> tuple[Cell, ...]:
    measured, predicted = row.run.measured[name], row.predicted[name]
    low, high = row.intervals[name]
    values = (shown(v) for v in (measured, predicted, low, high))
    return (*values, round(error_pct(row, name), 1), "yes" if low <= measured <= high else "no")


def _worst_case(row: Row, name: str, detail: Detail | None) -> tuple[Cell, ...]:
    measured, predicted, _, _, error, inside = _beside(row, name)
    latency = name.partition(".")[0]
    timed = detail is not None and (latency.endswith("_ms") or name in RATES)
    shares = detail.shares_of(name) if detail and timed else {}
    largest = sorted(shares, key=lambda family: -shares[family])[:3]
    blamed: tuple[Cell, Cell] = (largest[0] if largest else "–", "–")
    if largest and latency != "ttft_ms":
        ratio = row.run.measured[name] / row.predicted[name]
        slower = (1 / ratio if name in RATES else ratio) - 1
        factor = 1 + slower / shares[largest[0]]
        blamed = (largest[0], round(factor, 2) if factor > 0 else "none")
    text = ", ".join(f"{family} {100 * shares[family]:.0f} %" for family in largest) or "–"
    title, regime = HEADLINES[name], load_regime(row)
    return (title, row.run.run_id, regime, measured, predicted, error, inside, text, *blamed)


def _listed(names: Iterator[str]) -> tuple[int, str]:
    found = sorted(set(names))
    return len(found), ", ".join(found)


def _ranges(loads: Sequence[Load]) -> Iterator[tuple[str, float, float]]:
    values = {
        "clients of closed loops": [load.concurrency for load in loads if load.concurrency],
        "requests/s of open loops": [float(str(load.rate_per_s)) for load in loads],
        "prompt tokens, mean": [load.isl.mean for load in loads],
        "output tokens, mean": [load.osl.mean for load in loads],
    }
    for name, found in values.items():
        above = [float(f"{value:.3g}") for value in found if value > 0]
        if above:
            yield name, min(above), max(above)
