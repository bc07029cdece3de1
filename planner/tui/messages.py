"""What workers tell the screens. Workers post these and touch nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from textual.message import Message

if TYPE_CHECKING:
    from pathlib import Path

    from executor.case import Measurement
    from executor.observe import Observation
    from planner.ladder.ladder import Ladder
    from planner.measuring.measure import BackendState
    from planner.plans.plan import Plan
    from planner.prediction.predict import Prediction
    from planner.question import PlanRequest, Problem
    from planner.tui.catalogue import Catalogue
    from planner.tui.jobs import SearchSeen, Simulated
    from planner.tui.question import Question
    from planner.validation.validate import Validation
    from planner.what_if import Answer, SensitivityPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The plan at hand and what it was made of."""

    question: Question
    problem: Problem
    request: PlanRequest
    plan: Plan
    calibration: str = ""
    """The user's own calibration file that it rests on; empty where there is none."""


@dataclass
class CatalogueRead(Message):
    """The shipped profiles are known."""

    catalogue: Catalogue


@dataclass
class FieldsRefused(Message):
    """Fields of the form hold what cannot be planned with."""

    errors: dict[str, str]


@dataclass
class FieldsAccepted(Message):
    """Every field of the form can be planned with; the search begins."""

    defaults: dict[str, str]
    """What an empty field stands for."""


@dataclass
class SearchProgressed(Message):
    """A search goes on."""

    seen: SearchSeen


@dataclass
class SearchEnded(Message):
    """A search is done."""

    session: Session
    was_stopped: bool


@dataclass
class CandidatePredicted(Message):
    """The candidate under the cursor of the front was predicted."""

    index: int
    prediction: Prediction


@dataclass
class ChangeAnswered(Message):
    """A changed configuration was predicted."""

    answer: Answer


@dataclass
class ChangeSimulated(Message):
    """A changed configuration was simulated."""

    settings: dict[str, str]
    simulated: Simulated


@dataclass
class ChangeRefused(Message):
    """A changed knob cannot be computed."""

    knob: str
    reason: str


@dataclass
class SensitivityKnown(Message):
    """Each value of one knob was predicted."""

    knob: str
    points: tuple[SensitivityPoint, ...]


@dataclass
class BackendsKnown(Message):
    """Which backends there are, and whether they can run here."""

    states: tuple[BackendState, ...]


@dataclass
class MeasurementSeen(Message):
    """A measurement goes on."""

    seen: Observation
    log_tail: str


@dataclass
class MeasurementEnded(Message):
    """A measurement is done, or was stopped."""

    measurements: list[Measurement]
    was_stopped: bool


@dataclass
class RunsValidating(Message):
    """Runs are being predicted."""

    done: int
    in_all: int


@dataclass
class FitProgressed(Message):
    """A fit goes on; it has so many parts."""

    done: int
    in_all: int


@dataclass
class FitMade(Message):
    """An engine's constants were fitted; nothing is in force yet."""

    engine: str
    candidate: Path
    """The file that would be put into force."""
    lines: tuple[str, ...]
    """What was found, in words."""
    after: Validation
    """The runs under the new constants."""


@dataclass
class RunsValidated(Message):
    """A file of measured runs was predicted."""

    path: str
    validation: Validation


@dataclass
class RunDiagnosed(Message):
    """One run was looked into."""

    run_id: str
    lines: tuple[str, ...]


@dataclass
class LadderClimbs(Message):
    """A ladder goes on."""

    step: str


@dataclass
class LadderPredicted(Message):
    """Every step of a ladder was predicted."""

    ladder: Ladder


@dataclass
class PlanMade(Message):
    """A changed configuration became a plan of its own."""

    session: Session
    plan: Plan


@dataclass
class FilesWritten(Message):
    """A plan's files were written."""

    folder: str


@dataclass
class WorkerFailed(Message):
    """A worker could not do its work."""

    task: str
    reason: str
