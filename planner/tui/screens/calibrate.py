"""Calibrate: how far predictions are from measurements, and a new fit: accept or discard it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Static

from planner.own_calibrations import put_in_force, set_aside
from planner.tui.messages import FitMade, FitProgressed, RunsValidated, WorkerFailed
from planner.tui.screens.runs_base import RunsFileScreen
from planner.tui.widgets.scatter_plot import ScatterPlot
from planner.tui.widgets.text_input import TextInput
from planner.tui.worker import worker
from planner.validation.validate import MetricError, Row, errors_by_metric

REGIME_METRICS = ("tpot_ms.mean", "ttft_ms.mean", "output_tok_per_s")
"""Metrics whose errors are shown by regime too."""

LONG_PROMPT_RATIO = 8.0
"""Prompt over output length from which a run counts as dominated by its prompts."""


class CalibrateScreen(RunsFileScreen):
    """Errors, what is in force, and a new fit beside the old."""

    MODE = "calibrate"
    HELP_TEXT = (
        "Name a file of measured runs (JSON lines) or a store and press Enter: errors in percent "
        "by GPU, engine, model, metric and regime, and how many measurements the 90 % interval "
        "holds. Ctrl+R fits the engine's constants anew; ○ is before, • after. Ctrl+A puts the "
        "fit into force for your plans, Ctrl+D discards it, Ctrl+O returns to what is shipped. "
        "A fit takes minutes; Esc gives it up."
    )
    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("ctrl+r", "recalibrate", "Recalibrate"),
        Binding("ctrl+a", "accept", "Accept", priority=True),
        Binding("ctrl+d", "discard", "Discard", priority=True),
        Binding("ctrl+o", "shipped", "Shipped"),
        Binding("ctrl+n", "metric", "Metric"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.fit: FitMade | None = None
        """A fit that was neither accepted nor discarded."""
        self.is_fitting = False

    def compose_body(self) -> ComposeResult:
        """Lay out runs, errors, scatter and what is in force."""
        with Vertical(id="runs-bar"):
            yield TextInput(
                placeholder="runs.jsonl or a store, then Enter", compact=True, id="runs-file"
            )
            yield Static("Name a file of measured runs.", id="runs-words", markup=False)
        with Horizontal(id="calibrate-body"):
            with VerticalScroll(id="errors-side"):
                yield Static("", id="in-force")
                yield Static("", id="errors")
            with VerticalScroll(id="scatter-side"):
                yield ScatterPlot()
                yield Static("", id="fit")

    def on_mount(self) -> None:
        """Show what is in force."""
        self.query_one("#scatter-side").display = False
        self.on_catalogue()
        self.query_one("#runs-file").focus()

    def on_catalogue(self) -> None:
        """List the calibrations that predictions read."""
        own = self.planner_app.own_calibrations()
        shipped = [e.name.partition("/") for e in self.planner_app.catalogue.of("calibration")]
        words = Text("In force: ", style="bold")
        for engine, path in own.items():
            words.append(f"yours for {engine}, {path}; ")
        engines = ", ".join(n for folder, _, n in shipped if folder == "engines" and n not in own)
        words.append(f"shipped constants of {engines or 'no other engine'}", style="not bold")
        gpus = ", ".join(folder for folder, _, _ in shipped if folder != "engines")
        words.append(f"; operators measured on {gpus}\n", style="not bold")
        self.query_one("#in-force", Static).update(words)

    def show_validation(self, event: RunsValidated) -> None:
        """Show the errors by GPU, engine and model, and every run."""
        result = event.validation
        limited = len(result.rows) - len(result.without_front_end_limited().rows)
        words = f"{len(result.rows)} runs predicted, {len(result.skipped)} skipped"
        if limited:
            words += f"; {limited} limited by the front end, not the GPU"
        if not result.rows and result.skipped:
            words += f": {result.skipped[0][0]}: {result.skipped[0][1]}"
        self.say(words)
        self.query_one("#errors", Static).update(_all_errors(result.rows))
        self.query_one("#scatter-side").display = bool(result.rows)
        self.query_one(ScatterPlot).show(result.rows)

    def action_metric(self) -> None:
        """Show another metric in the scatter."""
        self.query_one(ScatterPlot).next_metric()

    def action_recalibrate(self) -> None:
        """Fit the engine's constants on the runs at hand."""
        shown = self.planner_app.validation
        engines = {row.run.engine for row in shown.validation.rows} if shown else set()
        if self.is_fitting:
            self.say("A fit goes on.")
        elif shown is None or not engines:
            self.say("✗ there are no runs to fit: name a file and press Enter")
        elif len(engines) > 1:
            self.say(f"✗ runs of {', '.join(sorted(engines))}: fit one engine at a time")
        else:
            self.is_fitting = True
            self.say("Fitting …")
            self.recalibrate(shown.path, engines.pop())

    @work(thread=True, exclusive=True, group="fit", exit_on_error=False)
    def recalibrate(self, path: str, engine: str) -> None:
        """Let another process fit and predict the runs anew."""
        from planner.tui import jobs  # noqa: PLC0415  first paint

        def heard(progress: tuple[int, int]) -> None:
            self.post_message(FitProgressed(*progress))

        # A name of its own each time: what was read of a file is remembered by its name.
        candidate = Path(tempfile.mkdtemp(prefix="planner-fit-")) / f"{engine}.json"
        try:
            lines, after = worker("calibrate").run(
                jobs.recalibrate, path, engine, str(candidate), heard=heard
            )
            self.post_message(FitMade(engine, candidate, tuple(lines), after))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("The fit", str(error) or repr(error)))

    @on(FitProgressed)
    def show_fit_progress(self, event: FitProgressed) -> None:
        """Show how far the fit is."""
        self.say(f"Fitting: {event.done} of {event.in_all} parts done …")

    @on(FitMade)
    def show_fit(self, event: FitMade) -> None:
        """Show before and after."""
        self.fit, self.is_fitting = event, False
        before = self.planner_app.validation
        old = before.validation.rows if before else ()
        new = event.after.rows
        self.say("Before and after: Ctrl+A accepts, Ctrl+D discards.")
        self.query_one(ScatterPlot).show(new, old)
        self.query_one("#errors", Static).update(_before_after(old, new))
        self.query_one("#fit", Static).update("\n".join(event.lines))

    def action_accept(self) -> None:
        """Put the fit into force."""
        if self.fit is None:
            self.say("There is no fit to accept: Ctrl+R makes one.")
            return
        path = put_in_force(
            self.fit.candidate, name=self.fit.engine, folder=self.planner_app.calibration_folder
        )
        self._close_fit(f"✓ In force: {path}. Plans and predictions use it from now on.")

    def action_discard(self) -> None:
        """Forget the fit."""
        if self.fit is None:
            self.say("There is no fit to discard.")
            return
        self.fit.candidate.unlink(missing_ok=True)
        self._close_fit("Discarded; what was in force stays in force.")

    def action_shipped(self) -> None:
        """Return to what is shipped."""
        if not self.planner_app.own_calibrations():
            self.say("What is shipped is in force.")
            return
        set_aside(self.planner_app.calibration_folder)
        self._close_fit("Your calibration is set aside (*.json.old); the shipped is in force.")

    @on(WorkerFailed)
    def end_fit(self) -> None:
        """Let another fit begin; what went wrong is said by the screens' common part."""
        self.is_fitting = False

    def _close_fit(self, words: str) -> None:
        self.fit = None
        self.query_one("#fit", Static).update("")
        self.on_catalogue()
        worker("calibrate").close()  # it remembers what the files held
        shown = self.planner_app.validation
        if shown is not None:
            self.validate(shown.path)
        self.notify(words, markup=False)


def _all_errors(rows: Sequence[Row]) -> Group:
    parts: list[Table | Text] = []
    if len(rows) > 1:
        parts += [Text("By regime", style="bold"), _by_regime(rows), Text()]
    keys = dict.fromkeys((r.run.gpu, r.run.engine, r.run.model) for r in rows)
    for key in keys:
        own = [r for r in rows if (r.run.gpu, r.run.engine, r.run.model) == key]
        parts += [Text(f"{' '.join(key)} ({len(own)} runs)", style="bold")]
        parts += [_errors(errors_by_metric(own)), Text()]
    return Group(*parts)


def regime(row: Row) -> str:
    """Return the kind of load of a run: how it is sent, and whether prompts dominate."""
    isl, osl, _ = row.run.lengths()
    long = "prompts dominate" if isl.mean() > LONG_PROMPT_RATIO * osl.mean() else "outputs dominate"
    return f"{row.run.protocol.replace('_', ' ')}, {long}"


def _by_regime(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("MAPE %")
    for name in ("n", "TPOT", "TTFT", "tok/s"):
        table.add_column(name, justify="right")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(regime(row), []).append(row)
    for name, own in sorted(groups.items()):
        errors = errors_by_metric(own)
        cells = [f"{errors[m].mape_pct:.1f}" if m in errors else "–" for m in REGIME_METRICS]
        table.add_row(name, str(len(own)), *cells)
    return table


def _errors(metrics: Mapping[str, MetricError]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("metric")
    for title in ("n", "MAPE %", "bias %", "in 90 %"):
        table.add_column(title, justify="right")
    for name, error in metrics.items():
        table.add_row(
            name, str(error.n), f"{error.mape_pct:.1f}", f"{error.bias_pct:+.1f}",
            f"{error.coverage_90_pct:.0f} %",
        )  # fmt: skip
    return table


def _before_after(before: Iterable[Row], after: Iterable[Row]) -> Table:
    old, new = errors_by_metric(before), errors_by_metric(after)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("MAPE %")
    for title in ("n", "before", "after", "bias before", "after"):
        table.add_column(title, justify="right")
    for name in (name for name in new if name in old):
        a, b = old[name], new[name]
        sign = "✓" if b.mape_pct < a.mape_pct else "✗" if b.mape_pct > a.mape_pct else "="
        table.add_row(
            f"{sign} {name}", str(b.n), f"{a.mape_pct:.1f}", f"{b.mape_pct:.1f}",
            f"{a.bias_pct:+.1f}", f"{b.bias_pct:+.1f}",
        )  # fmt: skip
    return table
