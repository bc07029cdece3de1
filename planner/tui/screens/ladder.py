"""The ladder of the question at hand: step by step down in precision, every step predicted."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static
from textual.worker import get_current_worker

from planner.tui.messages import LadderClimbs, LadderPredicted, WorkerFailed
from planner.tui.question import Question
from planner.tui.worker import worker

WIDE = 110
"""Columns from which every figure of a step has room."""


class LadderScreen(ModalScreen[None]):
    """What each precision would cost and bring; nothing is measured."""

    BINDINGS = [("escape,q", "close", "Close")]  # noqa: RUF012  Textual's form

    def __init__(self, question: Question, calibration: str) -> None:
        super().__init__()
        self.question, self.calibration = question, calibration
        self.is_done = False

    def compose(self) -> ComposeResult:
        """Lay out the dialog."""
        with Vertical(id="ladder", classes="dialog"):
            yield Static("The ladder, predicted; Esc closes", classes="title")
            with VerticalScroll():
                yield Static("Predicting …", id="steps")
                yield Static("", id="steps-words", markup=False)

    def on_mount(self) -> None:
        """Let the arrow keys scroll, and begin."""
        self.query_one(VerticalScroll).focus()
        self.predict()

    @work(thread=True, exit_on_error=False)
    def predict(self) -> None:
        """Let another process predict every step."""
        from planner.tui import jobs  # noqa: PLC0415  first paint

        cancelled = get_current_worker()

        def heard(step: str) -> None:
            if not cancelled.is_cancelled:
                self.post_message(LadderClimbs(step))

        try:
            arguments = (self.question, self.calibration)
            found = worker("ladder").run(jobs.predict_ladder, *arguments, heard=heard)
            if not cancelled.is_cancelled:
                self.post_message(LadderPredicted(found))
        except Exception as error:  # noqa: BLE001  the worker's edge
            if not cancelled.is_cancelled:
                self.post_message(WorkerFailed("The ladder", str(error) or repr(error)))

    @on(LadderClimbs)
    def show_progress(self, event: LadderClimbs) -> None:
        """Say which step is looked at."""
        self._say(f"Predicting {event.step} …")

    @on(LadderPredicted)
    def show_steps(self, event: LadderPredicted) -> None:
        """Show every step beside the others."""
        from planner.text.ladder_table import (  # noqa: PLC0415  the ladder pulls in the engines
            COLUMNS,
            FEW_COLUMNS,
            ladder_lines,
            steps_table,
        )

        self.is_done, found = True, event.ladder
        columns = COLUMNS if self.app.size.width >= WIDE else FEW_COLUMNS
        heading = Text(f"{found.model} on {found.gpu}, workload {found.workload}\n", style="bold")
        table = steps_table(found, columns, gap=1)
        self.query_one("#steps", Static).update(Group(heading, table))
        words = "\n".join(("", *ladder_lines(found), "", _how_to_build(found.model)))
        self.query_one("#steps-words", Static).update(words)

    @on(WorkerFailed)
    def show_failure(self, event: WorkerFailed) -> None:
        """Say why there is no ladder."""
        event.stop()
        self.is_done = True
        self._say(f"✗ {event.reason}")

    def action_close(self) -> None:
        """Close, and give up what is still predicted."""
        if not self.is_done:
            worker("ladder").abandon()
        self.dismiss()

    def _say(self, words: str) -> None:
        self.query_one("#steps", Static).update(Text(words))


def _how_to_build(model: str) -> str:
    """Return the commands that build and measure what is only predicted here."""
    return (
        f"Built, measured and judged: planner ladder --model DIR (weights of {model}) "
        "--calibration-data FILE --data FILE --out DIR; one step alone: planner quantize"
    )
