"""Measure: run candidates of the plan on a backend, watch, and see what was predicted beside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Input, Static

from cost_models.errors import PlannerError
from planner.tui.catalogue import Entry
from planner.tui.live import Live
from planner.tui.messages import (
    BackendsKnown,
    MeasurementEnded,
    MeasurementSeen,
    Session,
    WorkerFailed,
)
from planner.tui.question import whole_number
from planner.tui.screens.base import PlannerScreen
from planner.tui.text import short_deployment
from planner.tui.widgets.candidate_list import CandidateList
from planner.tui.widgets.field import Field
from planner.tui.widgets.live_tables import (
    BESIDE,
    beside_table,
    figures_table,
    gpu_table,
    lost_words,
)
from planner.tui.widgets.rate_plot import RatePlot
from planner.tui.worker import worker

if TYPE_CHECKING:
    from planner.measuring.request import MeasureRequest
    from planner.prediction.predict import Prediction

LABELS = {
    "backend": "Backend",
    "model": "Model",
    "workload": "Workload",
    "settings": "Knobs",
    "options": "Options",
    "requests": "Requests",
    "repeats": "Repeats",
    "budget": "Budget s",
    "store": "Store",
}

VALUES = {"backend": "transformers", "budget": "600", "store": "planner-runs.db"}

HINTS = {
    "model": "the plan's",
    "workload": "the plan's",
    "settings": "knob=value …",
    "options": "name=value …",
    "requests": "the workload's",
    "repeats": "until stable",
}


class MeasureScreen(PlannerScreen):
    """Choose candidates and a backend, and watch them run."""

    MODE = "measure"
    HELP_TEXT = (
        "Candidates come from the plan at hand (F2); Space marks them. Ctrl+R measures, Esc stops: "
        "the server is ended and what was measured is kept. Every run goes into the store, "
        "failures too; F6 and F7 read it. An empty field takes the plan's value. ↓ lists the "
        "backends, with the line that installs what is missing."
    )
    BINDINGS = [  # noqa: RUF012  Textual's form
        Binding("ctrl+r", "measure", "Measure"),
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+l", "log", "Log"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.shown: Session | None = None
        self.live = Live()
        self.backends: tuple[Entry, ...] = ()
        self.refused: dict[str, str] = {}
        """Why a backend cannot run here, by name."""
        self._stop: threading.Event | None = None

    @property
    def is_measuring(self) -> bool:
        """Whether a measurement goes on."""
        return self._stop is not None

    def compose_body(self) -> ComposeResult:
        """Lay out the form, the live figures and the log."""
        kept = {**VALUES, **self.planner_app.state.measuring}
        with Horizontal(id="body"):
            with VerticalScroll(id="form", can_focus=False):
                for name, label in LABELS.items():
                    yield Field(
                        name,
                        label,
                        value=kept.get(name, ""),
                        placeholder=HINTS.get(name, ""),
                        choices=(lambda: self.backends) if name == "backend" else None,
                    )
            with VerticalScroll(id="measuring", can_focus=True):
                yield Static("", id="measure-words", markup=False)
                yield CandidateList()
                yield Static("", id="beside")
                with Vertical(id="live"):
                    yield Static("", id="figures")
                    yield RatePlot()
                    yield Static("", id="gpus")
                yield Static("", id="log", markup=False)

    def on_mount(self) -> None:
        """Ask which backends can run here."""
        self.query_one("#live").display = False
        self._say("Ctrl+R measures what is marked.")
        self.find_backends()

    def on_screen_resume(self) -> None:
        """Offer the candidates of the plan at hand."""
        candidates = self.query_one(CandidateList)
        if self.session is self.shown and candidates.names:
            return
        self.shown = self.session
        names = [short_deployment(prediction.deployment) for prediction in self._predictions()]
        # The last is no plan's.
        candidates.show([*names, "the backend's own defaults"], 0)

    @work(thread=True, group="backends", exit_on_error=False)
    def find_backends(self) -> None:
        """Find out which backends can run here."""
        from planner.measuring.measure import doctor  # noqa: PLC0415  first paint

        try:
            self.post_message(BackendsKnown(tuple(doctor())))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("Looking for backends", str(error) or repr(error)))

    @on(BackendsKnown)
    def list_backends(self, event: BackendsKnown) -> None:
        """List the backends, with the way to those that are missing."""
        entries = []
        for state in event.states:
            here = state.availability
            words = f"ready {here.version}" if here.can_run else f"✗ {here.problem}"
            if not here.can_run:
                hint = f": {here.install}" if here.install else ""
                self.refused[state.name] = f"{here.problem}{hint}"
                words += hint
            entries.append(Entry.choice(state.name, words))
        self.backends = tuple(entries)
        self._check_backend()

    @on(Input.Changed)
    def check_field(self, event: Input.Changed) -> None:
        """Say at once what is wrong with a field, and keep what the form says for the next time."""
        self.planner_app.remember(measuring={name: self._text(name) for name in LABELS})
        if event.input.name == "backend":
            self._check_backend()
        elif event.input.name in LABELS:
            self._request()

    @on(Input.Submitted)
    def next_field(self) -> None:
        """Enter goes on to the next field."""
        self.focus_next()

    def action_measure(self) -> None:
        """Measure what is marked."""
        request = self._request()
        if self.is_measuring:
            self._say("It is being measured; Esc stops.")
        elif not self.query_one(CandidateList).marked:
            self._say("✗ mark a candidate first: Space in the list.")
        elif request is not None and self._check_backend():
            self.live, self._stop = Live(), threading.Event()
            self.query_one("#beside", Static).update("")
            self.query_one("#live").display = True
            self._say("Starting …")
            self.measure(request, self._stop)

    def action_stop(self) -> None:
        """Stop; the server is ended and what was measured stays."""
        if self._stop is not None:
            self._stop.set()
            self._say("Stopping: the server is being ended …")

    def on_unmount(self) -> None:
        """Leave no server behind."""
        if self._stop is not None:
            self._stop.set()

    def action_log(self) -> None:
        """Go to the log."""
        self.query_one("#measuring").focus()
        self.query_one("#measuring", VerticalScroll).scroll_end(animate=False)

    @work(thread=True, exclusive=True, group="measure", exit_on_error=False)
    def measure(self, request: MeasureRequest, stop: threading.Event) -> None:
        """Let another process measure: the clock of a load is not to wait for the screen."""
        from planner.tui import jobs  # noqa: PLC0415  first paint

        def heard(seen: tuple[Any, str]) -> None:
            self.post_message(MeasurementSeen(*seen))

        try:
            found = worker("measure").run(jobs.measure, request, heard=heard, stop=stop)
            self.post_message(MeasurementEnded(found, stop.is_set()))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("The measurement", str(error) or repr(error)))

    @on(MeasurementSeen)
    def show_live(self, event: MeasurementSeen) -> None:
        """Show what is seen now."""
        lost = self.live.lost_gpus
        self.live.add(event.seen)
        if self.live.lost_gpus and self.live.lost_gpus != lost:
            self.notify(lost_words(self.live.lost_gpus), severity="warning", timeout=15)
        if self._stop is not None and not self._stop.is_set():
            self._say(f"{self.live.phase}, {self.live.left_s:.0f} s left")
        self.query_one("#figures", Static).update(figures_table(self.live))
        self.query_one(RatePlot).show(self.live.rates)
        self.query_one("#gpus", Static).update(gpu_table(self.live))
        self.query_one("#log", Static).update(f"Log\n{event.log_tail}" if event.log_tail else "")

    @on(MeasurementEnded)
    def show_end(self, event: MeasurementEnded) -> None:
        """Show how it ended, and predicted beside measured."""
        self._stop = None
        self.planner_app.remember(runs_file=self._text("store"))
        self.planner_app.validation = None
        runs = [run for found in event.measurements for run in found.records]
        good = [run for run in runs if run["status"] == "ok"]
        if event.was_stopped:
            self._say("Stopped: the server has ended, what was measured is in the store.")
        elif len(good) == len(runs):
            runs_are = "run is" if len(good) == 1 else "runs are"
            self._say(f"✓ {len(good)} {runs_are} in {self._text('store')}; F6 compares, F7 fits.")
        else:
            self._say(f"✗ {len(runs) - len(good)} of {len(runs)} runs failed: see below.")
        self.query_one("#beside", Static).update(beside_table(runs, self._predicted(runs)))

    @on(WorkerFailed)
    def show_failure(self, event: WorkerFailed) -> None:
        """Say why nothing is measured."""
        event.stop()
        self._stop = None
        self._say(f"✗ {event.task} failed: {event.reason}")

    def _predictions(self) -> Sequence[Prediction]:
        if self.shown is None:
            return ()
        plan = self.shown.plan
        return (plan.recommended, *(other.prediction for other in plan.alternatives))

    def _chosen(self) -> list[Prediction]:
        """Return the marked candidates of the plan."""
        marked = self.query_one(CandidateList).marked
        return [p for index, p in enumerate(self._predictions()) if index in marked]

    def _predicted(self, runs: Sequence[Mapping[str, Any]]) -> tuple[str, Mapping[str, float]]:
        """Return for which GPU a prediction is, and its values; a run's own comes first."""
        own = next((run["predicted"] for run in runs if run.get("predicted")), None)
        if own is not None:
            return str(runs[0]["gpu"]), {name: said["value"] for name, said in own.items()}
        chosen = self._chosen()
        if self.shown is None or len(chosen) != 1:
            return "", {}
        prediction = chosen[0]
        values = {name: prediction.value(name) for _, name in BESIDE if name in prediction.metrics}
        return self.shown.problem.gpu.name, values

    def _request(self) -> MeasureRequest | None:
        """Return what the form asks for, or None; what is wrong is said at its field."""
        from planner.knobs import parse_assignments  # noqa: PLC0415
        from planner.measuring.request import MeasureRequest  # noqa: PLC0415

        readers: dict[str, Callable[[], Any]] = {
            "settings": lambda: parse_assignments(self._text("settings").split(), "knob"),
            "options": lambda: parse_assignments(self._text("options").split(), "option"),
            "requests": lambda: whole_number(self._text("requests") or "0", 0, 1_000_000),
            "repeats": lambda: whole_number(self._text("repeats") or "0", 0, 1000),
            "budget": lambda: float(whole_number(self._text("budget"), 1, 10**6)),
        }
        values: dict[str, Any] = {}
        for name, reader in readers.items():
            try:
                values[name] = reader()
                self._field(name).show_problem("")
            except PlannerError as error:
                self._field(name).show_problem(str(error))
        if len(values) < len(readers):
            return None
        request = MeasureRequest(
            backend=self._text("backend"),
            workload=self._text("workload"),
            model=self._text("model"),
            configs=[prediction.config for prediction in self._chosen()],
            settings=values["settings"],
            backend_options=values["options"],
            num_requests=values["requests"],
            repeats=values["repeats"],
            time_budget_s=values["budget"],
            store=self._text("store"),
        )
        return self._with_load_of_plan(request)

    def _with_load_of_plan(self, request: MeasureRequest) -> MeasureRequest | None:
        """Fill in from the plan what the form leaves open, its changed load among it."""
        if request.workload:
            return request
        if self.shown is None:
            self._field("workload").show_problem("there is no plan: name a workload")
            return None
        self._field("workload").show_problem("")
        asked = self.shown.question
        return replace(
            request,
            workload=asked.workload,
            model=request.model or asked.model,
            rate_per_s=float(asked.rate) if asked.rate else None,
            isl=float(asked.isl) if asked.isl else None,
            osl=float(asked.osl) if asked.osl else None,
        )

    def _check_backend(self) -> bool:
        name = self._text("backend")
        known = {entry.name for entry in self.backends}
        problem = self.refused.get(name, "")
        if known and name not in known:
            problem = f"unknown; known: {', '.join(sorted(known))}"
        self._field("backend").show_problem(problem)
        return not problem

    def _field(self, name: str) -> Field:
        return self.query_one(f"#field-{name}", Field)

    def _text(self, name: str) -> str:
        return self._field(name).input.value.strip()

    def _say(self, words: str) -> None:
        self.query_one("#measure-words", Static).update(words)
