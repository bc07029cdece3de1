"""The heavy work of the screens, as functions for a worker process; see `planner.tui.worker`."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.tui.question import Checked, Question, check, read_loss_limit, read_slo
from planner.tui.text import short_deployment
from planner.tui.worker import Link, interrupt_when

if TYPE_CHECKING:
    from cost_models.deployment import Deployment
    from executor.case import Measurement
    from executor.observe import Observation
    from planner.ladder.ladder import Ladder
    from planner.measuring.request import MeasureRequest
    from planner.plans.plan import Plan
    from planner.prediction.predict import Prediction
    from planner.question import PlanRequest, Problem
    from planner.search.study import Candidate
    from planner.simulator.timeline import Timeline
    from planner.tui.catalogue import Catalogue
    from planner.validation.validate import Validation

PROGRESS_S = 0.1
"""Shortest time between two reports of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSeen:
    """How far a search is."""

    evaluated: int
    expected: int
    best: str
    """The best configuration so far, in one line; empty before there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A changed configuration, simulated."""

    prediction: Prediction
    timeline: Timeline | None
    """None where nothing could be simulated."""


def read_profiles(link: Link) -> Catalogue:
    """Read every shipped profile."""
    from planner.tui.catalogue import read_catalogue  # noqa: PLC0415

    del link
    return read_catalogue()


def search(
    link: Link, question: Question, calibration: str, effort: Mapping[str, Any]
) -> tuple[Checked, Plan | None]:
    """Check a question and search; without a plan, the check says what is wrong.

    Reports what empty fields stand for (a mapping by field), then `SearchSeen`.
    """
    from planner.plans.make import plan_problem  # noqa: PLC0415  the worker's first work

    checked = _checked(question, calibration, _modified_s(calibration))
    if checked.problem is None or checked.request is None:
        return checked, None
    link.report(defaults(checked.problem))
    watch = _Watch(link)
    request = replace(
        checked.request,
        **effort,
        progress=watch.progress,
        on_best=watch.best,
        stopped=link.is_stopped,
    )
    return checked, plan_problem(checked.problem, request)


def simulate(
    link: Link,
    question: Question,
    calibration: str,
    deployment: Deployment,
    settings: Mapping[str, str],
) -> Simulated:
    """Simulate a deployment with changed knobs under the load of a question."""
    from planner.prediction.highest_rate import highest_rate  # noqa: PLC0415
    from planner.question import predict_problem  # noqa: PLC0415
    from planner.simulator.timeline import timeline  # noqa: PLC0415
    from planner.workloads.demand import workload_demand  # noqa: PLC0415

    del link
    problem, _ = _known(question, calibration)
    demand = workload_demand(problem.workload)
    prediction, _ = predict_problem(problem, deployment, settings, demand=demand)
    if prediction.feasible:
        rate = highest_rate(problem.evaluator, prediction.deployment, demand).rate_per_s
        prediction = replace(prediction, highest_rate_per_s=rate)
    result = prediction.simulation
    return Simulated(prediction=prediction, timeline=timeline(result) if result else None)


def measure(link: Link, request: MeasureRequest) -> list[Measurement]:
    """Measure; reports each observation with the end of the newest log.

    A stop, or the screen's end, ends every server; what was measured by then is stored, and
    nothing is returned.
    """
    from planner.measuring.measure import measure_request  # noqa: PLC0415

    lock = threading.Lock()

    def observe(seen: Observation) -> None:
        with lock:
            link.report((seen, newest_log_tail(Path(request.workdir), since_s)))

    since_s = time.time()
    ended = interrupt_when(link.is_stopped)
    try:
        return measure_request(replace(request, observe=observe))
    except KeyboardInterrupt:
        return []
    finally:
        ended.set()


def newest_log_tail(folder: Path, since_s: float) -> str:
    """Return the end of the log that a folder's newest server writes, or nothing.

    Args:
        folder: The work directory of a measurement.
        since_s: Logs last written before are those of earlier servers; seconds since 1970.
    """
    from executor.process import tail  # noqa: PLC0415

    logs = [(path.stat().st_mtime, path) for path in folder.glob("*.log")]
    written = [entry for entry in logs if entry[0] >= since_s]
    if not written:
        return ""
    return tail(max(written)[1].read_text("utf-8", "replace"))


def predict_ladder(link: Link, question: Question, calibration: str) -> Ladder:
    """Predict a question's model step by step down in precision; reports each step in words."""
    from planner.ladder.ladder import ladder  # noqa: PLC0415
    from planner.ladder.request import LadderRequest  # noqa: PLC0415

    problem, asked = _known(question, calibration)
    request = LadderRequest(
        gpu=asked.gpu,
        model=asked.model,
        workload=asked.workload,
        backend=asked.engine,
        max_quality_loss_pct=asked.max_quality_loss_pct,
        predict_only=True,
        progress=link.report,
    )
    return ladder(request, problem)


def diagnose(link: Link, source: str, run_id: str, question: Question) -> list[str]:
    """Return in words what is wrong with one run of a file or a store, and why.

    Args:
        link: Nothing is reported.
        source: As `validate` takes it.
        run_id: As `validate` names it.
        question: Its stated limits are those that the run had to keep.
    """
    from planner.diagnosis.diagnose import diagnose as diagnosing  # noqa: PLC0415
    from planner.text.lines import diagnosis_lines  # noqa: PLC0415
    from planner.tui.calibrating import run_and_store  # noqa: PLC0415

    del link
    run, store = run_and_store(source, run_id)
    found = diagnosing(
        run,
        store=store,
        slo=read_slo(question.slo),
        max_quality_loss_pct=read_loss_limit(question.max_quality_loss),
    )
    same = [one for one in found if one.run_id == run_id] or found  # ids may begin alike
    return list(diagnosis_lines(same[0]))


def validate(link: Link, path: str, calibrations: Mapping[str, str]) -> Validation:
    """Predict every run of a file, each engine's under its calibration; reports (done, in all)."""
    from planner.tui.calibrating import validated  # noqa: PLC0415

    return validated(path, calibrations, progress=lambda done, n: link.report((done, n)))


def recalibrate(link: Link, path: str, engine: str, out: str) -> tuple[list[str], Validation]:
    """Fit an engine's constants into a file and predict the runs under it.

    Reports (done, in all).
    """
    from planner.tui.calibrating import fit, validated  # noqa: PLC0415

    lines = fit(path, engine=engine, out=out, progress=lambda done, n: link.report((done, n)))
    return lines, validated(path, {engine: out})


def defaults(problem: Problem) -> dict[str, str]:
    """Return what an empty field stands for, as one would type it."""
    work, load = problem.workload, problem.evaluator.load
    return {
        "model": problem.model.name,
        "rate": f"{work.arrival.rate_per_s:g}" if work.arrival.rate_per_s else "set by clients",
        "isl": f"{load.isl.mean:.0f}",
        "osl": f"{load.osl.mean:.0f}",
        "slo": " ".join(f"{name}={limit:g}" for name, limit in problem.slo.items()) or "none",
        "max_quality_loss": "no limit",
        "objective": work.objective,
    }


def _known(question: Question, calibration: str) -> tuple[Problem, PlanRequest]:
    """Return what a question that was planned for names.

    Raises:
        ConfigError: Its files have changed since, and can no longer be read.
    """
    from cost_models.errors import ConfigError  # noqa: PLC0415

    checked = _checked(question, calibration, _modified_s(calibration))
    if checked.problem is None or checked.request is None:
        raise ConfigError("; ".join(checked.errors.values()))
    return checked.problem, checked.request


@lru_cache(maxsize=8)
def _checked(question: Question, calibration: str, modified_s: float) -> Checked:
    """Load a question's problem; the calibration's time tells a changed file from the known."""
    del modified_s
    return check(question, calibration=calibration)


def _modified_s(calibration: str) -> float:
    return Path(calibration).stat().st_mtime if calibration else 0.0


class _Watch:
    """Reports a search, not more often than a person can read."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.candidate: Candidate | None = None
        self.reported = 0.0

    def best(self, candidate: Candidate) -> None:
        """Remember the best so far."""
        self.candidate = candidate

    def progress(self, evaluated: int, expected: int) -> None:
        """Report, unless the last report is fresh."""
        now = time.monotonic()
        if now - self.reported >= PROGRESS_S:
            self.reported = now
            best = short_deployment(self.candidate.deployment) if self.candidate else ""
            self.link.report(SearchSeen(evaluated=evaluated, expected=expected, best=best))
