"""What screens share that read a file of measured runs."""

from __future__ import annotations

from pathlib import Path

from textual import on, work
from textual.widgets import Input, Static

from planner.tui.messages import RunsValidated, WorkerFailed
from planner.tui.screens.base import PlannerScreen


class RunsFileScreen(PlannerScreen):
    """A screen with an input for a runs file, predicted in a worker."""

    def on_screen_resume(self) -> None:
        """Take over the file of the last time, or of the other screen."""
        field = self.query_one("#runs-file", Input)
        shown = self.planner_app.validation
        if shown is not None:
            field.value = shown.path
            self.show_validation(shown)
        elif not field.value and self.planner_app.state.runs_file:
            field.value = self.planner_app.state.runs_file

    @on(Input.Submitted, "#runs-file")
    def open_file(self, event: Input.Submitted) -> None:
        """Predict every run of the file."""
        path = event.value.strip()
        if not path:
            self.say("✗ name a file of measured runs (JSON lines)")
        elif not Path(path).expanduser().is_file():
            self.say(f"✗ {path}: no such file")
        else:
            self.say("Predicting every run …")
            self.validate(str(Path(path).expanduser()))

    @work(thread=True, exclusive=True, group="validation", exit_on_error=False)
    def validate(self, path: str) -> None:
        """Predict every run of a file."""
        from planner.validation.validate import validate  # noqa: PLC0415  only here

        try:
            self.post_message(RunsValidated(path, validate(path)))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("Reading the runs", str(error) or repr(error)))

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
        self.say(f"✗ {event.reason}")

    def say(self, words: str) -> None:
        """Say something below the field."""
        self.query_one("#runs-words", Static).update(words)

    def show_validation(self, event: RunsValidated) -> None:
        """Show predicted runs."""
        raise NotImplementedError
