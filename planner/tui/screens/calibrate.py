"""Calibrate: the error of every metric on measured runs, and what is in force."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Input, Static

from planner.tui.messages import RunsValidated
from planner.tui.screens.runs_base import RunsFileScreen
from planner.validation.validate import MetricError


class CalibrateScreen(RunsFileScreen):
    """How far predictions are from measurements, and which calibrations they use."""

    MODE = "calibrate"
    HELP_TEXT = (
        "Give a file of measured runs (JSON lines) and press Enter: errors in percent by GPU, "
        "engine, model and metric, and how many measurements the 90 % interval holds. "
        "`planner calibrate` fits new constants."
    )

    def compose_body(self) -> ComposeResult:
        """Lay out file, errors and what is in force."""
        with Vertical(id="runs-bar"):
            yield Input(placeholder="runs.jsonl, then Enter", compact=True, id="runs-file")
            yield Static("Name a file of measured runs.", id="runs-words", markup=False)
        with VerticalScroll(id="calibrate-body"):
            yield Static("", id="errors")
            yield Static("", id="in-force")

    def on_mount(self) -> None:
        """Show what is in force."""
        self.on_catalogue()
        self.query_one("#runs-file").focus()

    def on_catalogue(self) -> None:
        """List the calibrations that predictions read."""
        lines = [Text("\nIn force", style="bold")]
        for entry in self.planner_app.catalogue.of("calibration"):
            folder, _, name = entry.name.partition("/")
            what = "step constants of" if folder == "engines" else "operators of"
            lines.append(Text(f"{what} {name if folder == 'engines' else entry.name}"))
        self.query_one("#in-force", Static).update(Group(*lines))

    def show_validation(self, event: RunsValidated) -> None:
        """Show the errors by GPU, engine and model."""
        result = event.validation
        limited = len(result.rows) - len(result.without_front_end_limited().rows)
        words = f"{len(result.rows)} runs predicted, {len(result.skipped)} skipped"
        if limited:
            words += f"; {limited} limited by the front end, not the GPU"
        self.say(words)
        parts: list[Table | Text] = []
        for group in result.groups:
            heading = f"{group.gpu} {group.engine} {group.model} ({group.n} runs)"
            parts += [Text(heading, style="bold"), _errors(group.metrics), Text()]
        self.query_one("#errors", Static).update(Group(*parts))


def _errors(metrics: Mapping[str, MetricError]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("metric")
    for title in ("n", "MAPE %", "median %", "bias %", "in 90 % interval"):
        table.add_column(title, justify="right")
    for name, error in metrics.items():
        table.add_row(
            name, str(error.n), f"{error.mape_pct:.1f}", f"{error.median_ape_pct:.1f}",
            f"{error.bias_pct:+.1f}", f"{error.coverage_90_pct:.0f} %",
        )  # fmt: skip
    return table
