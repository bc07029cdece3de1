"""Plan: the question on the left, the recommendation and its reasons on the right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.timer import Timer
from textual.widgets import Input, ProgressBar, Static
from textual.worker import get_current_worker

from planner.tui.catalogue import Entry
from planner.tui.messages import (
    CandidatePredicted,
    FieldsAccepted,
    FieldsRefused,
    SearchEnded,
    SearchProgressed,
    Session,
    WorkerFailed,
)
from planner.tui.question import Question
from planner.tui.screens.base import PlannerScreen
from planner.tui.screens.export import ExportScreen
from planner.tui.screens.ladder import LadderScreen
from planner.tui.text import in_short, short_deployment
from planner.tui.widgets.field import Field
from planner.tui.worker import worker

if TYPE_CHECKING:
    from planner.prediction.predict import Prediction
    from planner.search.study import Candidate

DEBOUNCE_S = 0.25
"""Quiet time after the last keystroke before a search starts."""

MAX_GPUS = 8
"""One node, the most that the search takes."""

ENGINE = "trtllm"
"""What plans are made for."""

LABELS = {
    "gpu": "GPU",
    "num_gpus": "GPUs",
    "workload": "Workload",
    "model": "Model",
    "rate": "Rate /s",
    "isl": "ISL mean",
    "osl": "OSL mean",
    "slo": "SLO ms",
    "max_quality_loss": "Loss ≤ %",
    "objective": "Objective",
}

OBJECTIVES = (
    Entry.choice("goodput", "highest request rate under the SLO"),
    Entry.choice("throughput", "output tokens/s per GPU at that rate"),
    Entry.choice("latency", "lowest mean E2E latency at the given load"),
    Entry.choice("cost", "lowest USD per million output tokens at the given load"),
)


class PlanScreen(PlannerScreen):
    """Ask, search, and read the recommendation."""

    MODE = "plan"
    HELP_TEXT = (
        "Say what is served on what; every change searches again. A field left empty takes the "
        "workload's value, which it shows dimmed. PgDn and PgUp go through the answer. ★ is the "
        "recommendation; with the plot in focus, ← and → (or a click) move ◆ along the Pareto "
        "front and the tables follow; + stands on it only for losing less quality. Loss ≤ % "
        "limits what precisions may be expected to lose. Ctrl+L sets the precisions side by side. "
        "Ctrl+S writes the files, quantize.sh among them where the checkpoint is not published in "
        "the recommended precision (planner quantize makes one too)."
    )
    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+r", "restart", "Search"),
        Binding("ctrl+g", "front", "Plot"),
        Binding("ctrl+l", "ladder", "Ladder"),
        Binding("ctrl+s", "export", "Export"),
        Binding("pagedown", "scroll_results(1)", "Results down", show=False),
        Binding("pageup", "scroll_results(-1)", "Results up", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.question = Question()
        """What the form holds."""
        self._debounce: Timer | None = None
        self._stop = threading.Event()
        self._searched_with: tuple[str, float] | None = None

    def compose_body(self) -> ComposeResult:
        """Lay out the form, the middle and the right side."""
        self.question = self.planner_app.state.question
        # The plot pulls in NumPy: it is mounted after the first paint.
        with Horizontal(id="body"):
            with VerticalScroll(id="form", can_focus=False):
                for name, label in LABELS.items():
                    yield Field(
                        name,
                        label,
                        value=getattr(self.question, name),
                        choices=self._choices(name),
                    )
            with VerticalScroll(id="results"):
                with Vertical(id="centre"):
                    yield Static("", id="headline", markup=False)
                    yield ProgressBar(id="progress", show_eta=False)
                    yield Static("", id="config")
                with VerticalScroll(id="right", can_focus=True):
                    yield Static("", id="prediction")
                    yield Static("", id="reasons")

    def on_mount(self) -> None:
        """Paint the frame first; plot and numbers come after it."""
        self.query_one(ProgressBar).display = False
        self.query_one("#headline", Static).update("Searching …")
        self.query_one(Input).focus()
        self.call_after_refresh(self._mount_figures)

    def _mount_figures(self) -> None:
        from planner.tui.widgets.front_plot import FrontPlot  # noqa: PLC0415  after first paint
        from planner.tui.widgets.memory_bar import MemoryBar  # noqa: PLC0415

        self.query_one("#centre").mount(FrontPlot(), MemoryBar(id="memory"))
        self.start_search()

    def on_catalogue(self) -> None:
        """Plan for the GPUs of this machine, at the first start."""
        local, gpu = self.planner_app.catalogue.local, self.query_one("#field-gpu", Field).input
        is_untouched = gpu.value == Question().gpu
        if self.planner_app.may_take_local_gpu and local.profile and is_untouched:
            gpu.value = local.profile
            self.query_one("#field-num_gpus", Field).input.value = str(min(local.count, MAX_GPUS))

    def on_screen_resume(self) -> None:
        """Search again where another calibration is in force by now."""
        if self._searched_with not in (None, self.planner_app.calibration_in_force(ENGINE)):
            self.start_search()

    @on(Input.Changed)
    def ask_again(self, event: Input.Changed) -> None:
        """Search again once the typing pauses."""
        name = event.input.name or ""
        if event.value.strip() == getattr(self.question, name):
            return
        self.question = replace(self.question, **{name: event.value.strip()})
        self._stop.set()
        if self._debounce is not None:
            self._debounce.stop()
        self._debounce = self.set_timer(DEBOUNCE_S, self.start_search)

    @on(Input.Submitted)
    def next_field(self) -> None:
        """Enter goes on to the next field."""
        self.focus_next()

    def start_search(self) -> None:
        """Search for the form as it stands."""
        self._stop.set()
        self._stop = threading.Event()
        self.planner_app.remember(question=self.question)
        self._searched_with = self.planner_app.calibration_in_force(ENGINE)
        self.search(self.question, self._stop)

    def action_stop(self) -> None:
        """Stop the search and keep the best so far."""
        self._stop.set()

    def action_restart(self) -> None:
        """Search again."""
        self.start_search()

    def action_front(self) -> None:
        """Put the keyboard on the plot."""
        self.query_one("#front").focus()

    def action_scroll_results(self, pages: int) -> None:
        """Go through the answer while the keyboard stays in the form."""
        results = self.query_one("#results" if self.has_class("-narrow") else "#right")
        results.scroll_relative(y=pages * (results.size.height - 2), animate=False)

    def action_export(self) -> None:
        """Write the plan's files."""
        if self.session is None:
            self.notify("There is no plan to export yet.", severity="warning")
        else:
            self.app.push_screen(ExportScreen(self.session))

    def action_ladder(self) -> None:
        """Predict the model step by step down in precision."""
        if self.session is None:
            self.notify("There is no plan yet whose model could be taken.", severity="warning")
        else:
            self.app.push_screen(LadderScreen(self.session.question, self.session.calibration))

    @work(thread=True, exclusive=True, group="search", exit_on_error=False)
    def search(self, question: Question, stop: threading.Event) -> None:
        """Let another process check the form and search, and report as it goes."""
        if get_current_worker().is_cancelled:
            return
        try:
            self._search(question, stop)
        except Exception as error:  # noqa: BLE001  the worker's edge: a notice, never a traceback
            if not get_current_worker().is_cancelled:
                self.post_message(WorkerFailed("The search", str(error) or repr(error)))

    def _search(self, question: Question, stop: threading.Event) -> None:
        from planner.tui import jobs  # noqa: PLC0415  first paint

        cancelled = get_current_worker()

        def heard(message: Any) -> None:
            if cancelled.is_cancelled:
                return
            if isinstance(message, jobs.SearchSeen):
                self.post_message(SearchProgressed(message))
            else:
                self.post_message(FieldsAccepted(message))

        app = self.planner_app
        calibration = app.own_calibrations().get(ENGINE, "")
        arguments = (question, calibration, app.search_effort)
        checked, plan = worker("search").run(jobs.search, *arguments, heard=heard, stop=stop)
        if cancelled.is_cancelled:
            return
        if plan is None:
            self.post_message(FieldsRefused(checked.errors))
            return
        session = Session(
            question=question,
            problem=checked.problem,
            request=checked.request,
            plan=plan,
            calibration=calibration,
        )
        self.post_message(SearchEnded(session, stop.is_set()))

    @on(FieldsRefused)
    def show_problems(self, event: FieldsRefused) -> None:
        """Say at each field what is wrong with it."""
        for name in LABELS:
            self.query_one(f"#field-{name}", Field).show_problem(event.errors.get(name, ""))
        self.query_one(ProgressBar).display = False
        wrong = ", ".join(LABELS.get(name, name) for name in event.errors)
        self.query_one("#headline", Static).update(f"✗ Not searched: see {wrong}")

    @on(FieldsAccepted)
    def show_defaults(self, event: FieldsAccepted) -> None:
        """Show in empty fields what the workload gives them."""
        for name, text in event.defaults.items():
            field = self.query_one(f"#field-{name}", Field)
            field.show_problem("")
            field.input.placeholder = text
        for name in ("gpu", "num_gpus", "workload"):
            self.query_one(f"#field-{name}", Field).show_problem("")
        self.query_one(ProgressBar).display = True
        self.query_one("#headline", Static).update("Searching …")

    @on(SearchProgressed)
    def show_progress(self, event: SearchProgressed) -> None:
        """Show how far the search is, and the best so far."""
        seen = event.seen
        self.query_one(ProgressBar).update(total=seen.expected, progress=seen.evaluated)
        words = f"Searching … {seen.evaluated:,} evaluated"
        if seen.best:
            words += f"\nbest so far {seen.best}"
        self.query_one("#headline", Static).update(words)

    @on(SearchEnded)
    def show_plan(self, event: SearchEnded) -> None:
        """Show the recommendation."""
        from planner.tui.widgets.front_plot import FrontPlot  # noqa: PLC0415  first paint
        from planner.tui.widgets.tables import reasons_view  # noqa: PLC0415

        plan = event.session.plan
        self.planner_app.session = event.session
        self.query_one(ProgressBar).display = False
        found = plan.search
        state = "Stopped" if event.was_stopped else "Done"
        verdict = "Recommended" if plan.status == "feasible" else "✗ Nothing is feasible; nearest"
        self.query_one("#headline", Static).update(
            f"★ {verdict} for {plan.objective}\n{in_short(plan.recommended)}\n"
            f"{state}: {found.num_evaluated:,} tried in {found.wall_s:.1f} s, "
            f"{len(found.fastest)} on the front"
        )
        self.query_one(FrontPlot).show(found)
        self.query_one("#reasons", Static).update(reasons_view(plan))
        self._show_prediction(plan.recommended)

    def _show_prediction(self, prediction: Prediction) -> None:
        from planner.tui.widgets.memory_bar import MemoryBar  # noqa: PLC0415  first paint
        from planner.tui.widgets.tables import config_table, prediction_view  # noqa: PLC0415

        self.query_one("#config", Static).update(config_table(prediction.deployment))
        self.query_one("#prediction", Static).update(prediction_view(prediction))
        self.query_one(MemoryBar).show(prediction.memory)

    def on_front_plot_moved(self, event: object) -> None:
        """Let the tables follow the cursor of the front."""
        index = getattr(event, "index", None)
        if self.session is None:
            return
        if index is None:
            best = self.session.plan.recommended
            self.query_one("#headline", Static).update(f"★ Recommended\n{in_short(best)}")
            self._show_prediction(self.session.plan.recommended)
            return
        front = sorted(self.session.plan.search.fastest, key=lambda c: c.tok_per_s_per_user)
        self.predict_candidate(self.session, front[index], index)

    @work(thread=True, exclusive=True, group="candidate", exit_on_error=False)
    def predict_candidate(self, session: Session, candidate: Candidate, index: int) -> None:
        """Predict a candidate of the front."""
        from planner.what_if import ask  # noqa: PLC0415  first paint

        try:
            prediction = ask(session.problem, candidate.deployment, {}).prediction
            self.post_message(CandidatePredicted(index, prediction))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("The prediction", str(error) or repr(error)))

    @on(CandidatePredicted)
    def show_candidate(self, event: CandidatePredicted) -> None:
        """Show a candidate of the front in the tables."""
        if self.session is not None:
            size = len(self.session.plan.search.fastest)
            self.query_one("#headline", Static).update(
                f"◆ {event.index + 1} of {size} on the Pareto front (r returns to ★)\n"
                f"{short_deployment(event.prediction.deployment)}\n{in_short(event.prediction)}"
            )
            self._show_prediction(event.prediction)

    @on(WorkerFailed)
    def show_failure(self, event: WorkerFailed) -> None:
        """Say that a worker failed, and the way out; the application adds a notice."""
        self.query_one(ProgressBar).display = False
        self.query_one("#headline", Static).update(f"✗ {event.task} failed; Ctrl+R searches again")

    def _choices(self, name: str) -> Callable[[], Sequence[Entry]] | None:
        if name == "objective":
            return lambda: OBJECTIVES
        if name == "gpu":
            return lambda: self.planner_app.catalogue.gpu_choices
        if name in ("model", "workload"):
            return lambda: self.planner_app.catalogue.of(name)
        return None
