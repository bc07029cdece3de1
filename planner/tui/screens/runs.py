"""Runs: what was measured beside what is predicted, one run or two side by side."""

from __future__ import annotations

from rich.columns import Columns
from rich.table import Table
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.widgets import DataTable, Input, Static

from planner.tui.messages import RunsValidated
from planner.tui.screens.runs_base import RunsFileScreen
from planner.tui.text import number
from planner.validation.validate import Row

OVERVIEW = (
    ("TPOT ms", "tpot_ms.mean"),
    ("TTFT ms", "ttft_ms.mean"),
    ("tok/s/GPU", "output_tok_per_s_per_gpu"),
)
"""(title, metric) of the table, each predicted / measured."""


class RunsScreen(RunsFileScreen):
    """Measured runs of a file, each beside its prediction."""

    MODE = "runs"
    HELP_TEXT = (
        "Give a file of measured runs (JSON lines) and press Enter. Cells read predicted / "
        "measured. c keeps the highlighted run beside the next ones."
    )
    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("c", "compare", "Keep beside"),
        Binding("slash", "file", "File"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[Row, ...] = ()
        self.kept: Row | None = None

    def compose_body(self) -> ComposeResult:
        """Lay out file, table and detail."""
        with Vertical(id="runs-bar"):
            yield Input(placeholder="runs.jsonl, then Enter", compact=True, id="runs-file")
            yield Static("Name a file of measured runs.", id="runs-words", markup=False)
        yield DataTable(id="runs-table", cursor_type="row", zebra_stripes=True)
        with VerticalScroll(id="runs-detail"):
            yield Static("", id="run")

    def on_mount(self) -> None:
        """Hide what is empty until a file is read."""
        self.query_one("#runs-table").display = False
        self.query_one("#runs-detail").display = False
        self.query_one("#runs-file").focus()

    def show_validation(self, event: RunsValidated) -> None:
        """Fill the table."""
        self.rows, self.kept = event.validation.rows, None
        skipped = event.validation.skipped
        words = f"{len(self.rows)} runs, predicted / measured"
        if skipped:
            words += f"; {len(skipped)} skipped, first {skipped[0][0]}: {skipped[0][1]}"
        self.say(words)
        self.query_one("#runs-table").display = True
        self.query_one("#runs-detail").display = True
        table = self.query_one(DataTable)
        table.clear(columns=True)
        table.add_columns("run", *(title for title, _ in OVERVIEW), "model", "GPU")
        for index, row in enumerate(self.rows):
            cells = [_pair(row, metric) for _, metric in OVERVIEW]
            table.add_row(row.run.run_id, *cells, row.run.model, row.run.gpu, key=str(index))
        table.focus()

    @on(DataTable.RowHighlighted)
    def show_run(self) -> None:
        """Show every metric of the run, and of the one that is kept."""
        row = self._row()
        if row is not None:
            shown = [_detail(row)] if self.kept is None else [_detail(self.kept), _detail(row)]
            self.query_one("#run", Static).update(Columns(shown, padding=(0, 4)))

    def action_compare(self) -> None:
        """Keep the run beside the next ones, or let it go."""
        row = self._row()
        self.kept = None if row is self.kept else row
        self.show_run()

    def action_file(self) -> None:
        """Go to the file."""
        self.query_one("#runs-file").focus()

    def _row(self) -> Row | None:
        at = self.query_one(DataTable).cursor_row
        return self.rows[at] if 0 <= at < len(self.rows) else None


def _pair(row: Row, metric: str) -> str:
    if metric not in row.predicted or metric not in row.run.measured:
        return "–"
    return f"{number(row.predicted[metric])} / {number(row.run.measured[metric])}"


def _detail(row: Row) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=row.run.run_id)
    table.title_justify = "left"
    table.add_column("metric")
    for title in ("predicted", "measured", "error", "90 %"):
        table.add_column(title, justify="right")
    for metric in row.scored():
        predicted, measured = row.predicted[metric], row.run.measured[metric]
        low, high = row.intervals[metric]
        inside = "inside" if low <= measured <= high else "outside"
        error = f"{100 * (predicted / measured - 1):+.1f} %"
        table.add_row(metric, number(predicted), number(measured), error, inside)
    return table
