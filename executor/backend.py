"""The contract of a backend: what can run here, what a configuration lacks, a running server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError, MeasurementError
from executor.load_generator import Endpoint, Prompt
from executor.protocols import LoadProtocol
from executor.records import MeasuredRequest

ENTRY_POINTS = "planner.backends"
"""Entry point group under which packages offer backends."""


class Failure(StrEnum):
    """How a run can end other than well; the `status` of its record."""

    NOT_AVAILABLE = "not_available"
    """The backend cannot run here, or cannot take the configuration."""
    PREPARE_FAILED = "prepare_failed"
    """A checkpoint or an engine could not be built."""
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED_AT_START = "crashed_at_start"
    START_TIMED_OUT = "start_timed_out"
    CRASHED = "crashed"
    """The server ended while requests were in flight."""
    HUNG = "hung"
    """The server lives, but nothing came within the limit."""
    LOST_CONNECTION = "lost_connection"
    WRONG_LENGTH = "wrong_length"
    REFUSED = "refused"
    OUT_OF_TIME = "out_of_time"
    INTERRUPTED = "interrupted"
    NOT_ENDED = "not_ended"
    """Processes or GPU memory of the server are still there."""


class ServerFailedError(MeasurementError):
    """An engine failed; what kind of failure, the end of its log, and what had been started."""

    def __init__(self, message: str, *, kind: Failure, log_tail: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.log_tail = log_tail
        self.command = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Which model, and where its files are."""

    name: str
    """As runs call it."""
    hub_name: str
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    """The content of its `config.json`, where it is known here."""
    folder: Path | None = None
    """A local checkpoint."""
    has_random_weights: bool = False
    """The engine makes up weights: the same speed, no download, no sense in the text."""
    vocab_size: int
    max_position_embeddings: int

    @property
    def label(self) -> str:
        """A short name for files and runs."""
        return self.name.removesuffix("/config.json").rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a backend is asked to bring up."""

    model: ModelSource
    config: EngineConfig
    workdir: Path
    """For logs and files made on the way."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What only this backend understands, as the person wrote it."""
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """Content of the engine's own options file, where the engine reads one."""
    build_script: str = ""
    """Makes the quantized checkpoint; empty where the published one will do."""
    draft: ModelSource | None = None
    """The model that `speculative_model` names; None where it is a name alone, or none."""

    @property
    def max_seq_len(self) -> int:
        """Longest sequence that the engine must take."""
        return self.config.max_seq_len or self.model.max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether a backend can run here."""

    can_run: bool
    version: str = ""
    problem: str = ""
    """Why not."""
    install: str = ""
    """The line that installs what is missing."""


class Server(ABC):
    """A server that answers; whoever started it must stop it."""

    endpoint: Endpoint
    command: str = ""
    notes: tuple[str, ...] = ()
    """What a reader of the run must know, as approximate lengths."""

    def facts(self) -> Mapping[str, float]:
        """Return what the engine says of its memory, in the names of a run's `measured`."""
        return {}

    def counters(self) -> Mapping[str, float]:
        """Return the engine's running counters, as `num_preemptions`."""
        return {}

    def kv_used_fraction(self) -> float | None:
        """Return which share of its KV cache is in use, or None where it does not tell."""
        return None

    def failure(self) -> ServerFailedError | None:
        """Return why the server has ended, or None while it lives."""
        return None

    def log_tail(self) -> str:
        """Return the end of its log."""
        return ""

    @abstractmethod
    def stop(self) -> None:
        """End it with everything it has started; it is safe to call twice.

        Raises:
            ServerFailedError: Something of it is still there.
        """


class Backend(ABC):
    """One way to run a configuration."""

    name: str
    engine: str
    """The `engine` of its runs."""
    uses_gpu: bool = True
    """Whether memory of a local GPU must be free again afterwards."""

    @abstractmethod
    def availability(self) -> Availability:
        """Say whether it can run here, without importing the engine."""

    def lacking(self, deployment: Launch) -> Sequence[str]:  # noqa: ARG002  may need none
        """Return what the installed version cannot do of this configuration; empty when all."""
        return ()

    def prepare(self, deployment: Launch, *, limit_s: float) -> Launch:  # noqa: ARG002
        """Build what must be built and return what is then to be started.

        Raises:
            ServerFailedError: It cannot be built, or not in time.
        """
        return deployment

    def engine_of(self, deployment: Launch) -> str:
        """Return the `engine` of the runs of a deployment; option `engine` names another."""
        return deployment.options.get("engine", self.engine)

    def versions(self) -> Mapping[str, str]:
        """Return the versions of the engine and of what it rests on."""
        return {}


class ServingBackend(Backend):
    """Brings up a server, which the load generator then measures."""

    @abstractmethod
    def start(self, deployment: Launch, *, limit_s: float) -> Server:
        """Return a server that answers; nothing is left running if this fails.

        Raises:
            ServerFailedError: It does not come up, or not in time.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """What an engine's own benchmark measured."""

    requests: tuple[MeasuredRequest, ...]
    measured: Mapping[str, Any]
    """In the terms of a run's `measured`."""
    command: str
    notes: tuple[str, ...] = ()


class BenchmarkBackend(Backend):
    """Measures with a program of the engine's own instead of a server."""

    @abstractmethod
    def benchmark(
        self,
        deployment: Launch,
        prompts: Sequence[Prompt],
        *,
        protocol: LoadProtocol,
        limit_s: float,
    ) -> BenchmarkResult:
        """Run the benchmark and read its report.

        Raises:
            ServerFailedError: It fails, takes too long, or reports something else.
        """


def backend_names() -> list[str]:
    """Return the names of all installed backends; none is imported."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def load_backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ConfigError: Unknown, or its package cannot be imported.
    """
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        raise ConfigError(f"backend {name!r} is unknown", hint=f"known: {', '.join(sorted(found))}")
    backend = _loaded(found[name])()
    if not isinstance(backend, Backend):
        raise ConfigError(f"backend {name!r}: {found[name].value} is not a Backend")
    return backend


def check_can_run(backend: Backend, deployment: Launch) -> None:
    """Refuse what the backend cannot do, before anything is started.

    Raises:
        ServerFailedError: With what is missing and the line that installs it.
    """
    here = backend.availability()
    if not here.can_run:
        raise ServerFailedError(
            f"backend {backend.name}: {here.problem}", kind=Failure.NOT_AVAILABLE, hint=here.install
        )
    lacking = backend.lacking(deployment)
    if lacking:
        raise ServerFailedError(
            f"{backend.name} {here.version} lacks: {'; '.join(lacking)}",
            kind=Failure.NOT_AVAILABLE,
        )


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backend {point.name!r} cannot be loaded ({error})") from error
