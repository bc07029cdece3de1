"""Runs: what was measured beside what is predicted, and plans; one, or two side by side."""

from __future__ import annotations

from pathlib import Path

from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.widgets import DataTable, Static
from textual.worker import get_current_worker

from cost_models.errors import PlannerError
from planner.tui.messages import RunDiagnosed, RunsValidated
from planner.tui.question import Question
from planner.tui.records import (
    OVERVIEW,
    Record,
    differing,
    record_of_plan,
    record_of_run,
    record_of_skipped,
)
from planner.tui.screens.record import ExportRecordsScreen, RecordScreen
from planner.tui.screens.runs_base import RunsFileScreen
from planner.tui.widgets.text_input import TextInput
from planner.tui.worker import worker


class RunsScreen(RunsFileScreen):
    """Measured runs, each beside its prediction, and plans."""

    MODE = "runs"
    HELP_TEXT = (
        "Name a file of measured runs (JSON lines), a store (planner-runs.db) or a plan.json and "
        "press Enter; a plan is added to what is listed. Cells of runs read predicted / measured. "
        "c keeps the highlighted line beside the next ones and shows in what they differ: knobs, "
        "load and measured figures (a plan's predicted ones); d says what is wrong with a run and "
        "why, with what to turn; the limits are the Plan screen's; Enter opens the whole record; "
        "Ctrl+S exports what is shown."
    )
    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("c", "compare", "Keep beside"),
        Binding("d", "diagnose", "Diagnose"),
        Binding("slash", "file", "File"),
        Binding("ctrl+s", "export", "Export"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.kept: Record | None = None

    def compose_body(self) -> ComposeResult:
        """Lay out file, table and detail."""
        with Vertical(id="runs-bar"):
            yield TextInput(
                placeholder="runs.jsonl, a store or a plan.json, then Enter",
                compact=True,
                id="runs-file",
            )
            yield Static("Name a file of measured runs.", id="runs-words", markup=False)
        yield DataTable(id="runs-table", cursor_type="row", zebra_stripes=True)
        with VerticalScroll(id="runs-detail"):
            yield Static("", id="run")

    def on_mount(self) -> None:
        """Hide what is empty until a file is read."""
        self.query_one("#runs-table").display = False
        self.query_one("#runs-detail").display = False
        self.query_one("#runs-file").focus()

    def open_source(self, path: str) -> None:
        """Add a plan, or predict every run of a file."""
        if not path.endswith(".json"):
            super().open_source(path)
            return
        try:
            record = record_of_plan(Path(path).expanduser())
        except PlannerError as error:
            self.say(f"✗ {error}")
            return
        self.records = [r for r in self.records if r.name != record.name] + [record]
        self.say(f"{len(self.records)} in the list; c on one line, then on another, compares")
        self._fill(len(self.records) - 1)

    def show_validation(self, event: RunsValidated) -> None:
        """Fill the table."""
        rows, skipped = event.validation.rows, event.validation.skipped
        self.records = [record_of_run(row) for row in rows]
        self.records += [record_of_skipped(*one) for one in skipped]
        self.kept = None
        words = f"{len(rows)} runs, predicted / measured"
        if skipped:
            words += f"; {len(skipped)} skipped, first {skipped[0][0]}: {skipped[0][1]}"
        self.say(words)
        self._fill(0)

    @on(DataTable.RowHighlighted)
    def show_record(self) -> None:
        """Show every metric of the record, and of the one that is kept."""
        record = self._record()
        if record is None:
            return
        if self.kept is None or self.kept is record:
            self.query_one("#run", Static).update(_detail(record))
            return
        pair = Columns([_detail(self.kept), _detail(record)], padding=(0, 4))
        self.query_one("#run", Static).update(Group(_differences(self.kept, record), pair))

    @on(DataTable.RowSelected)
    def open_record(self) -> None:
        """Show the whole record."""
        record = self._record()
        if record is not None:
            self.app.push_screen(RecordScreen(record.name, record.content))

    def action_compare(self) -> None:
        """Keep the line beside the next ones, or let it go."""
        record = self._record()
        self.kept = None if record is self.kept else record
        self.show_record()

    def action_diagnose(self) -> None:
        """Find out what is wrong with the highlighted run."""
        record, shown = self._record(), self.planner_app.validation
        if record is None or shown is None or not record.is_run:
            self.notify("Only a measured run can be diagnosed.", severity="warning")
            return
        self.query_one("#run", Static).update(Text(f"Diagnosing {record.name} …"))
        self.diagnose(shown.path, record.name, self.planner_app.state.question)

    @work(thread=True, exclusive=True, group="diagnosis", exit_on_error=False)
    def diagnose(self, source: str, run_id: str, question: Question) -> None:
        """Let another process look into a run."""
        from planner.tui import jobs  # noqa: PLC0415  first paint

        cancelled = get_current_worker()
        try:
            lines = worker("calibrate").run(jobs.diagnose, source, run_id, question)
            if not cancelled.is_cancelled:
                self.post_message(RunDiagnosed(run_id, tuple(lines)))
        except Exception as error:  # noqa: BLE001  the worker's edge: words in the pane
            if not cancelled.is_cancelled:
                reason = f"✗ {str(error) or repr(error)}"
                words = "Stopped." if self._is_stopped else reason
                self._is_stopped = False
                self.post_message(RunDiagnosed(run_id, (run_id, words)))

    @on(RunDiagnosed)
    def show_diagnosis(self, event: RunDiagnosed) -> None:
        """Show what was found, unless the highlight has moved on."""
        record = self._record()
        if record is not None and record.name == event.run_id:
            heading, *rest = event.lines
            words = Text.assemble((f"Diagnosis of {heading}\n", "bold"), "\n".join(rest))
            self.query_one("#run", Static).update(words)

    def action_file(self) -> None:
        """Go to the file."""
        self.query_one("#runs-file").focus()

    def action_export(self) -> None:
        """Write what is shown."""
        record = self._record()
        shown = [r for r in (self.kept, record if record is not self.kept else None) if r]
        if not shown:
            self.notify("There is nothing to export yet.", severity="warning")
        else:
            self.app.push_screen(ExportRecordsScreen([r.content for r in shown]))

    def _fill(self, highlighted: int) -> None:
        self.query_one("#runs-table").display = True
        self.query_one("#runs-detail").display = True
        table = self.query_one(DataTable)
        table.clear(columns=True)
        width = 24 if self.has_class("-narrow") else 44
        table.add_columns("run or plan", *(title for title, _ in OVERVIEW), "model", "GPU")
        for index, record in enumerate(self.records):
            table.add_row(_short(record.name, width), *record.cells, key=str(index))
        table.move_cursor(row=highlighted)
        table.focus()
        self.show_record()

    def _record(self) -> Record | None:
        at = self.query_one(DataTable).cursor_row
        return self.records[at] if 0 <= at < len(self.records) else None


def _short(name: str, width: int) -> str:
    """Return the end of a name: runs of one campaign begin alike."""
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _detail(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=Text(record.name))
    table.title_justify = "left"
    table.add_column("metric")
    for title in record.columns:
        table.add_column(title, justify="right")
    for line in record.lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


def _differences(first: Record, second: Record) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("differ in")
    for title in (first.name, second.name, "change"):
        table.add_column(Text(_short(title, 24)), justify="right")
    for line in differing(first, second):
        table.add_row(*(Text(cell) for cell in line))
    return table
