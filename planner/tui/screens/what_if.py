"""What if: every knob as a control, and at once what a change does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.timer import Timer
from textual.widgets import OptionList, Static
from textual.worker import get_current_worker

from planner.prediction.predict import Prediction
from planner.tui.jobs import Simulated
from planner.tui.messages import (
    ChangeAnswered,
    ChangeRefused,
    ChangeSimulated,
    PlanMade,
    SensitivityKnown,
    Session,
    WorkerFailed,
)
from planner.tui.screens.base import PlannerScreen
from planner.tui.screens.export import ExportScreen
from planner.tui.screens.ladder import LadderScreen
from planner.tui.screens.value import ValueScreen
from planner.tui.text import number
from planner.tui.widgets.knob_list import KnobList, spelled
from planner.tui.widgets.memory_bar import MemoryBar
from planner.tui.widgets.sensitivity_plot import SensitivityPlot
from planner.tui.widgets.simulation_plot import VIEWS, SimulationPlot
from planner.tui.widgets.tables import prediction_view
from planner.tui.worker import worker
from planner.what_if import Answer, Difference, ask, differences, knobs_of, legal_values, plan_of
from planner.what_if import sensitivity as sensitivity_of

DEBOUNCE_S = 0.3
"""Quiet time after an answer before the change is simulated."""

WORDS, CURVE = "words", "curve"
"""Views beside those of the simulated run; on few rows each has the screen for itself."""


class WhatIfScreen(PlannerScreen):
    """Change the recommendation knob by knob."""

    MODE = "what_if"
    HELP_TEXT = (
        "← and → go through a knob's legal values, Enter takes any value, Backspace returns to "
        "the recommendation's. Every change is predicted at once in closed form and compared "
        "with the recommendation; when you pause, it is simulated request by request. The curve "
        "shows the highlighted knob, m changes its metric; v goes on to the curve and to the "
        "simulated run: KV blocks used, wasted and shared, each step, and the queue. Ctrl+L sets "
        "the precisions side by side."
    )
    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("m", "metric", "Metric"),
        Binding("v", "view", "View"),
        Binding("ctrl+r", "reset_all", "Reset all"),
        Binding("ctrl+l", "ladder", "Ladder", show=False),
        Binding("ctrl+s", "export", "Export"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.shown: Session | None = None
        self.settings: dict[str, str] = {}
        self.answer: Answer | None = None
        self.simulated: Simulated | None = None
        self.view = WORDS
        self._debounce: Timer | None = None

    def compose_body(self) -> ComposeResult:
        """Lay out knobs, differences, curve and memory."""
        with Vertical(id="changes"):
            with Vertical(id="knob-side"):
                yield Static("", id="what-if-words", markup=False)
                yield KnobList(id="knobs", compact=True)
            with VerticalScroll(id="effect"):
                yield Static("", id="differences")
                yield SensitivityPlot()
                yield SimulationPlot()
                yield MemoryBar(id="memory")
                yield Static("", id="prediction")

    def on_mount(self) -> None:
        """Begin with words, and a curve where there is room."""
        self._arrange()

    def on_resize(self) -> None:
        """Show what the new size has room for."""
        self.call_after_refresh(self._arrange)  # once the size's classes are set

    def on_screen_resume(self) -> None:
        """Start from the plan at hand."""
        if self.session is None:
            self._say("There is no plan yet: F2, and wait for the recommendation.")
        elif self.session is not self.shown:
            self.shown, self.settings = self.session, {}
            self._show_knobs()
            self.query_one(KnobList).focus()
            self._ask()

    @on(KnobList.Stepped)
    def step(self, event: KnobList.Stepped) -> None:
        """Take the next or previous legal value."""
        if self.shown is None:
            return
        values = self._legal(self.shown, event.knob)
        present = self._values()[event.knob]
        at = values.index(present) if present in values else 0
        self._set(event.knob, values[min(max(at + event.by, 0), len(values) - 1)])

    @on(KnobList.ResetAsked)
    def reset(self, event: KnobList.ResetAsked) -> None:
        """Return a knob to the recommendation."""
        self.settings.pop(event.knob, None)
        self._changed(event.knob)

    @on(OptionList.OptionSelected, "#knobs")
    def type_value(self, event: OptionList.OptionSelected) -> None:
        """Take any value."""
        if self.shown is None:
            return
        knob = str(event.option_id)
        legal = ", ".join(spelled(value) for value in self._legal(self.shown, knob))

        def take(value: str | None) -> None:
            if value:
                self.settings[knob] = value
                self._changed(knob)

        self.app.push_screen(ValueScreen(knob, legal, spelled(self._values()[knob])), take)

    @on(OptionList.OptionHighlighted, "#knobs")
    def show_curve(self) -> None:
        """Draw the curve of the knob under the highlight."""
        knob = self.query_one(KnobList).knob
        if self.shown is not None and self.answer is not None and knob:
            self.predict_sensitivity(self.shown, self.answer, knob)

    def action_metric(self) -> None:
        """Show another metric in the curve."""
        self.query_one(SensitivityPlot).action_next_metric()

    def action_view(self) -> None:
        """Go on to the next of words, curve, KV blocks, steps and queue."""
        views = (WORDS, CURVE, *VIEWS)
        at = views.index(self.view)
        if self.view == WORDS and not self.has_class("-short"):
            at += 1  # words and curve are both there
        self.view = views[(at + 1) % len(views)]
        self._arrange()
        self._show_timeline()

    def _arrange(self) -> None:
        """Show the parts of the present view: on few rows, words or one plot."""
        short = self.has_class("-short")
        for part in ("#differences", "#memory", "#prediction"):
            self.query_one(part).display = self.view == WORDS or not short
        self.query_one(SensitivityPlot).display = self.view == CURVE or (
            self.view == WORDS and not short
        )
        self.query_one(SimulationPlot).display = self.view in VIEWS

    def action_reset_all(self) -> None:
        """Return to the recommendation."""
        self.settings = {}
        if self.shown is not None:
            self._show_knobs()
            self._ask()

    def action_export(self) -> None:
        """Write the files of the changed configuration."""
        if self.shown is None or self.answer is None:
            self.notify("There is nothing to export yet.", severity="warning")
        else:
            self.make_plan(self.shown, self.answer)

    def action_ladder(self) -> None:
        """Predict the model step by step down in precision."""
        if self.shown is None:
            self.notify("There is no plan yet whose model could be taken.", severity="warning")
        else:
            self.app.push_screen(LadderScreen(self.shown.question, self.shown.calibration))

    @work(thread=True, exclusive=True, group="answer", exit_on_error=False)
    def predict_change(self, session: Session, settings: Mapping[str, str], knob: str) -> None:
        """Predict the changed configuration."""
        from cost_models.errors import PlannerError  # noqa: PLC0415

        try:
            answer = ask(session.problem, session.plan.recommended.deployment, settings)
            self.post_message(ChangeAnswered(answer))
        except PlannerError as error:
            self.post_message(ChangeRefused(knob, str(error)))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("The prediction", str(error) or repr(error)))

    @work(thread=True, exclusive=True, group="simulation", exit_on_error=False)
    def simulate(self, session: Session, settings: Mapping[str, str]) -> None:
        """Let another process simulate the changed configuration."""
        from planner.tui import jobs  # noqa: PLC0415

        cancelled = get_current_worker()
        deployment = session.plan.recommended.deployment
        arguments = (session.question, session.calibration, deployment, settings)
        try:
            found = worker("simulate").run(jobs.simulate, *arguments)
            if not cancelled.is_cancelled:
                self.post_message(ChangeSimulated(dict(settings), found))
        except Exception as error:  # noqa: BLE001  the worker's edge
            if not cancelled.is_cancelled:
                self.post_message(WorkerFailed("The simulation", str(error) or repr(error)))

    @work(thread=True, exclusive=True, group="curve", exit_on_error=False)
    def predict_sensitivity(self, session: Session, answer: Answer, knob: str) -> None:
        """Predict every value of one knob."""
        deployment, num_gpus = answer.prediction.deployment, session.request.num_gpus
        try:
            points = sensitivity_of(session.problem, deployment, knob, num_gpus=num_gpus)
            self.post_message(SensitivityKnown(knob, points))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("The curve", str(error) or repr(error)))

    @work(thread=True, exclusive=True, group="export", exit_on_error=False)
    def make_plan(self, session: Session, answer: Answer) -> None:
        """Make the plan of the changed configuration."""
        try:
            plan = plan_of(session.problem, answer.prediction.deployment, session.request)
            self.post_message(PlanMade(session, plan))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("The export", str(error) or repr(error)))

    @on(PlanMade)
    def ask_folder(self, event: PlanMade) -> None:
        """Ask where the files go."""
        at = event.session
        session = Session(
            question=at.question, problem=at.problem, request=at.request, plan=event.plan
        )
        self.app.push_screen(ExportScreen(session))

    @on(ChangeAnswered)
    def show_answer(self, event: ChangeAnswered) -> None:
        """Show what the change does."""
        if self.shown is None:
            return
        self.answer, self.simulated = event.answer, None
        changed = event.answer.prediction
        found = differences(event.answer.base, changed)
        self._show_effect(found, changed, "Closed form; the simulation follows")
        self.query_one(MemoryBar).show(changed.memory)
        self._say(self._summary())
        self.show_curve()
        self._show_timeline()
        self._debounce = self.set_timer(DEBOUNCE_S, self._simulate)

    @on(ChangeSimulated)
    def show_simulation(self, event: ChangeSimulated) -> None:
        """Let the simulation take the place of the closed form, unless a key came between."""
        if self.shown is None or self.answer is None or event.settings != self.settings:
            return
        self.simulated = event.simulated
        changed = event.simulated.prediction
        source = "Simulated" if changed.simulation else "Closed form: nothing can be simulated"
        found = differences(self.shown.plan.recommended, changed)
        self._show_effect(found, changed, source)
        self._show_timeline()

    @on(ChangeRefused)
    def show_refusal(self, event: ChangeRefused) -> None:
        """Take the change back, and say why."""
        self.settings.pop(event.knob, None)
        self._show_knobs()
        self._say(f"✗ {event.reason}")

    @on(SensitivityKnown)
    def draw_curve(self, event: SensitivityKnown) -> None:
        """Draw the curve, unless the highlight has moved on."""
        if event.knob == self.query_one(KnobList).knob:
            present = self._values()[event.knob]
            self.query_one(SensitivityPlot).show(event.knob, event.points, present)

    def _legal(self, session: Session, knob: str) -> tuple[Any, ...]:
        shown = session.plan.recommended if self.answer is None else self.answer.prediction
        num_gpus = session.request.num_gpus
        return legal_values(session.problem, shown.deployment, knob, num_gpus=num_gpus)

    def _set(self, knob: str, value: Any) -> None:
        if value == self._base()[knob]:
            self.settings.pop(knob, None)
        else:
            self.settings[knob] = str(value)
        self._changed(knob)

    def _changed(self, knob: str) -> None:
        if self.shown is not None:
            self.query_one(KnobList).update_knob(knob, self._values()[knob], self._base()[knob])
            self._ask(knob)

    def _ask(self, knob: str = "") -> None:
        if self._debounce is not None:
            self._debounce.stop()
        self.workers.cancel_group(self, "simulation")
        if self.shown is not None:
            self.predict_change(self.shown, dict(self.settings), knob)

    def _simulate(self) -> None:
        if self.shown is not None:
            self.simulate(self.shown, dict(self.settings))

    def _show_timeline(self) -> None:
        if self.view in VIEWS:
            seen = self.simulated.timeline if self.simulated else None
            self.query_one(SimulationPlot).show(seen, self.view)

    def _show_effect(self, found: tuple[Difference, ...], changed: Prediction, source: str) -> None:
        self.query_one("#differences", Static).update(self._words(found, changed, source))
        self.query_one("#prediction", Static).update(prediction_view(changed))

    def _base(self) -> dict[str, Any]:
        from cost_models.deployment import ALL_KNOBS  # noqa: PLC0415  first paint

        if self.shown is None:
            return {}
        deployment = self.shown.plan.recommended.deployment
        return {knob: deployment.knob(knob) for knob in ALL_KNOBS}

    def _values(self) -> dict[str, Any]:
        """Present values; one that was typed and cannot be read stays as typed."""
        from cost_models.errors import ConfigError  # noqa: PLC0415
        from planner.knobs import parse_value  # noqa: PLC0415

        values = self._base()
        for knob, text in self.settings.items():
            try:
                values[knob] = parse_value(knob, text)
            except ConfigError:
                values[knob] = text
        return values

    def _show_knobs(self) -> None:
        if self.shown is not None:
            self.query_one(KnobList).show(
                knobs_of(self.shown.problem), self._values(), self._base()
            )

    def _summary(self) -> str:
        if not self.settings:
            return "The recommendation. Change a knob with ← →."
        changed = ", ".join(f"{knob}={spelled(value)}" for knob, value in self.settings.items())
        return f"Changed: {changed}"

    def _say(self, words: str) -> None:
        self.query_one("#what-if-words", Static).update(words)

    def _words(self, found: tuple[Difference, ...], changed: Prediction, source: str) -> Text:
        colours = self.app.theme_variables
        text = Text()
        text.append(f"{source}\n", style="italic")
        for reason in self.answer.not_deployable if self.answer else ():
            text.append(f"✗ not deployable: {reason}\n", style=f"bold {colours['error']}")
        if not self.settings:
            for plain in found:
                text.append(f"{plain.title}: {number(plain.after)} {plain.unit}\n")
        for difference in found if self.settings else ():
            sign, style = "=", ""
            if difference.is_better is not None:
                sign = "▲" if difference.is_better else "▼"
                style = colours["success" if difference.is_better else "error"]
            text.append(f"{sign} {difference.words}\n", style=style)
        text.append(f"Binding limit: {changed.binding_limit}", style="bold")
        return text
