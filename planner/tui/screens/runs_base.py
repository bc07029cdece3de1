"""What screens share that read measured runs, from a file or from the store."""

from __future__ import annotations

from textual import on, work
from textual.binding import Binding
from textual.widgets import Input, Static
from textual.worker import get_current_worker

from planner.tui.messages import RunsValidated, RunsValidating, WorkerFailed
from planner.tui.screens.base import PlannerScreen
from planner.tui.worker import worker


class RunsFileScreen(PlannerScreen):
    """A screen with an input for runs, predicted in another process."""

    BINDINGS = [Binding("escape", "stop", "Stop")]  # noqa: RUF012  Textual's form

    def __init__(self) -> None:
        super().__init__()
        self._is_stopped = False

    def on_screen_resume(self) -> None:
        """Take over the runs of the last time, or of the other screen."""
        field = self.query_one("#runs-file", Input)
        shown = self.planner_app.validation
        if shown is not None:
            field.value = shown.path
            self.show_validation(shown)
        elif self.planner_app.state.runs_file:
            field.value = self.planner_app.state.runs_file

    @on(Input.Submitted, "#runs-file")
    def open_file(self, event: Input.Submitted) -> None:
        """Open what is named."""
        self.open_source(event.value.strip())

    def open_source(self, path: str) -> None:
        """Predict every run of a file or a store."""
        if not path:
            self.say("✗ name a file of measured runs (JSON lines), or a store")
        else:
            self.say("Predicting every run …")
            self.validate(path)

    @work(thread=True, exclusive=True, group="validation", exit_on_error=False)
    def validate(self, path: str) -> None:
        """Let another process predict every run."""
        from planner.tui import jobs  # noqa: PLC0415  first paint

        cancelled = get_current_worker()

        def heard(progress: tuple[int, int]) -> None:
            if not cancelled.is_cancelled:
                self.post_message(RunsValidating(*progress))

        calibrations = self.planner_app.own_calibrations()
        try:
            found = worker("calibrate").run(jobs.validate, path, calibrations, heard=heard)
            if not cancelled.is_cancelled:
                self.post_message(RunsValidated(path, found))
        except Exception as error:  # noqa: BLE001  the worker's edge
            if not cancelled.is_cancelled:
                self.post_message(WorkerFailed("Reading the runs", str(error) or repr(error)))

    def action_stop(self) -> None:
        """Give up what goes on: a fit, or the prediction of many runs."""
        self._is_stopped = worker("calibrate").abandon()

    @on(RunsValidating)
    def show_progress(self, event: RunsValidating) -> None:
        """Show how far it is."""
        self.say(f"Predicting run {event.done + 1} of {event.in_all} …")

    @on(RunsValidated)
    def keep_validation(self, event: RunsValidated) -> None:
        """Show the runs, here and on the other screen."""
        self.planner_app.validation = event
        self.planner_app.remember(runs_file=event.path)
        self.show_validation(event)

    @on(WorkerFailed)
    def show_failure(self, event: WorkerFailed) -> None:
        """Say at the field what is wrong with the file."""
        event.stop()
        self.say("Stopped." if self._is_stopped else f"✗ {event.reason}")
        self._is_stopped = False

    def say(self, words: str) -> None:
        """Say something below the field."""
        self.query_one("#runs-words", Static).update(words)

    def show_validation(self, event: RunsValidated) -> None:
        """Show predicted runs."""
        raise NotImplementedError
