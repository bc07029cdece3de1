"""Makes the report and writes it: one HTML page, the same as Markdown, and its pictures."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_models.calibration import Calibration
from cost_models.errors import ConfigError
from planner.files import write_text
from planner.validation.report import tables
from planner.validation.report.detail import Detail, detail_of
from planner.validation.report.learning_curve import Point, learning_table, read_learning_curve
from planner.validation.report.pareto import fronts_of
from planner.validation.validate import Row, Validation, run_calibration

if TYPE_CHECKING:
    from planner.validation.report.figures import Picture

WORST_PER_METRIC = 2

MOST_KV_RUNS = 4

TITLE = "Validation report"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a report shows; the page and the Markdown hold the same."""

    summary: str
    tables: tuple[tables.Table, ...]
    pictures: tuple[Picture, ...]
    commands: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form: every table with the numbers that are shown."""
        return {
            "tables": [table.to_json() for table in self.tables],
            "commands": list(self.commands),
        }


def make_report(
    validation: Validation,
    *,
    runs: str,
    folder: str,
    calibration: str = "",
    learning_curve: str = "",
) -> Report:
    """Return the report of a validation.

    Args:
        validation: Predictions of the runs.
        runs: The runs file, as it was named.
        folder: Where the report goes, as it was named.
        calibration: The calibration file of the user's own that was used.
        learning_curve: JSON file with errors by number of fitted runs.

    Raises:
        ConfigError: The plotting or template library is missing.
        ProfileError: The learning curve or a requests file is damaged; nothing was predicted.
    """
    check_installed()
    from planner.validation.report import figures  # noqa: PLC0415  matplotlib takes a second

    points = read_learning_curve(learning_curve) if learning_curve else ()
    rows = validation.rows
    look = _Looker(calibration)
    serving = [row for row in rows if row.run.protocol != "capacity"]
    worst = _worst(rows)
    cases = [
        (row, name, look(row) if row.run.protocol != "capacity" else None) for row, name in worst
    ]
    contents = [
        tables.overall_errors(validation),
        tables.group_errors(validation),
        tables.regime_errors(validation),
        *([learning_table(points)] if points else []),
        tables.worst_cases(cases),
        tables.calibration_range(validation, _calibrations(rows, calibration)),
        *([tables.skipped_runs(validation)] if validation.skipped else []),
        tables.predicted_beside_measured(validation),
    ]
    drawn = (
        figures.scatter(rows),
        figures.errors_by_load(rows),
        figures.pareto(fronts_of(serving, calibration=calibration)),
        figures.kv_occupancy(_fullest([look(row) for row in _tightest(serving)])),
        figures.distributions([look(row) for row in _typical(serving)]),
        figures.learning_curve(points),
    )
    return Report(
        summary=_summary(validation),
        tables=tuple(contents),
        pictures=tuple(picture for picture in drawn if picture is not None),
        commands=_commands(runs, folder, calibration, learning_curve, points),
    )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.html`, `report.md` and the pictures that the Markdown shows; return the paths.

    Everything is rendered before the first file is written, and each file is written whole.

    Raises:
        ConfigError: The template library is missing.
        OSError: The folder cannot be written.
    """
    check_installed()
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    def environment(*, autoescape: bool) -> Environment:
        return Environment(
            loader=PackageLoader("planner.validation.report", "templates"),
            autoescape=autoescape,  # noqa: S701  Markdown is not HTML
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )

    facts = {
        "title": TITLE,
        "report": report,
        "version": metadata.version("trtllm-planner"),
        "python": platform.python_version(),
        "is_number": lambda cell: isinstance(cell, int | float),
        "shown": _shown,
    }
    page = environment(autoescape=True).get_template("page.html.j2").render(facts)
    text = environment(autoescape=False).get_template("page.md.j2").render(facts)
    files = {f"figures/{p.name}.svg": _standalone(p.svg) for p in report.pictures}
    # The pages come last: what they show is there when they are.
    files |= {"report.md": text, "report.html": page}
    for name, content in files.items():
        write_text(folder / name, content)
    return [folder / name for name in files]


def check_installed() -> None:
    """Check that what draws and fills pages is there.

    Raises:
        ConfigError: It is not.
    """
    try:
        import jinja2  # noqa: F401, PLC0415
        import matplotlib  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"--report needs {error.name}", hint="pip install 'trtllm-planner[report]'"
        ) from None


class _Looker:
    """Looks at runs closely, at each once."""

    def __init__(self, calibration: str) -> None:
        self._calibration = calibration
        self._seen: dict[int, Detail] = {}

    def __call__(self, row: Row) -> Detail:
        if id(row) not in self._seen:
            self._seen[id(row)] = detail_of(row, calibration=self._calibration)
        return self._seen[id(row)]


def _worst(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    found = []
    for name in tables.HEADLINES:
        scored = [row for row in rows if name in set(row.scored())]
        scored.sort(key=lambda row: -abs(tables.error_pct(row, name)))
        found += [(row, name) for row in scored[:WORST_PER_METRIC]]
    return found


def _tightest(rows: Sequence[Row]) -> list[Row]:
    """Runs whose requests are largest against the KV cache."""

    def fill(row: Row) -> float:
        load = row.run.load()
        tokens = row.predicted.get("kv_cache_tokens", 0.0)
        wanted = max(load.concurrency, 1.0) * (load.isl.mean + load.osl.mean)
        return wanted / tokens if tokens else 0.0

    return sorted(rows, key=fill, reverse=True)[: 2 * MOST_KV_RUNS]


def _fullest(details: Sequence[Detail]) -> list[Detail]:
    def peak(detail: Detail) -> float:
        seen = detail.timeline
        return float((seen.used_blocks / seen.capacity_blocks).max()) if seen else -1.0

    simulated = [detail for detail in details if detail.prediction.simulation is not None]
    return sorted(simulated, key=peak, reverse=True)[:MOST_KV_RUNS]


def _typical(rows: Sequence[Row]) -> list[Row]:
    """The runs with the best, the median and the worst E2E median, of those with requests."""
    known = [
        row
        for row in rows
        if "requests_file" in row.run.workload
        and "e2el_ms.p50" in set(row.scored())
        and row.intervals
    ]
    known.sort(key=lambda row: abs(tables.error_pct(row, "e2el_ms.p50")))
    chosen = dict.fromkeys((0, len(known) // 2, len(known) - 1)) if known else {}
    return [known[index] for index in chosen]


def _calibrations(rows: Sequence[Row], path: str) -> list[tuple[str, Calibration]]:
    found: dict[str, Calibration] = {}
    for row in rows:
        run = row.run
        name = f"{run.engine} {run.engine_version} on {run.gpu}".replace("  ", " ")
        found.setdefault(name, run_calibration(run, path))
    return list(found.items())


def _summary(validation: Validation) -> str:
    runs, groups = validation.rows, validation.groups
    errors = validation.overall
    parts = [
        f"{tables.HEADLINES[name].partition(',')[0]} {errors[name].mape_pct:.1f} %"
        for name in ("tpot_ms.mean", "output_tok_per_s", "e2el_ms.p50", "ttft_ms.mean")
        if name in errors
    ]
    shown = f" Mean absolute error: {', '.join(parts)}." if parts else ""
    return f"{len(runs)} runs of {len(groups)} combinations of GPU, engine and model.{shown}"


def _commands(
    runs: str, folder: str, calibration: str, curve: str, points: Sequence[Point]
) -> tuple[str, ...]:
    own = ["--calibration", calibration] if calibration else []
    learned = ["--learning-curve", curve] if points else []
    base = ["planner", "validate", runs, *own]
    return (
        shlex.join([*base, "--report", folder, *learned]),
        shlex.join([*base, "--json"]),
    )


def _shown(cell: tables.Cell) -> str:
    """Return a cell's text; thousands are parted by a thin gap only where the reader sees it."""
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _standalone(svg: str) -> str:
    """Return a picture as a file of its own: dark on white wherever it is shown."""
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    style = "color:#1c1f23;background:#fff;font-family:sans-serif"
    return head + svg.replace("<svg", f'<svg style="{style}"', 1) + "\n"
