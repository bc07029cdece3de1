"""What the backends share that start a server process of their own."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cost_models.errors import ConfigError
from executor.backend import Failure, Launch, Server, ServerFailedError
from executor.load_generator import Endpoint
from executor.process import ServerProcess, http_get

LogPattern = tuple[re.Pattern[str], float]
"""A pattern with one group, a number, and the unit that it is in."""


class LaunchedServer(Server):
    """A server that this program started.

    Args:
        process: The running process group.
        endpoint: Where it answers.
        log_facts: What its log says, by the name in a run's `measured`.
        counter_metrics: Its Prometheus counters, by the name in a run's `measured`.
        kv_gauge: Its Prometheus gauge of the share of the KV cache in use; empty: it has none.
    """

    def __init__(
        self,
        process: ServerProcess,
        *,
        endpoint: Endpoint,
        log_facts: Mapping[str, LogPattern],
        counter_metrics: Mapping[str, str] | None = None,
        kv_gauge: str = "",
    ) -> None:
        self.endpoint = endpoint
        self.command = process.command_line
        self._process = process
        self._log_facts = log_facts
        self._counter_metrics = counter_metrics or {}
        self._kv_gauge = kv_gauge

    def facts(self) -> dict[str, float]:
        """Return what the log says."""
        return facts_of_log(self._process.log_text(), self._log_facts)

    def counters(self) -> dict[str, float]:
        """Return the sums of its counters over all labels."""
        if not self._counter_metrics:
            return {}
        _, text = http_get(port=self.endpoint.port, path="/metrics")
        values = {name: metric_values(text, m) for name, m in self._counter_metrics.items()}
        return {name: sum(found) for name, found in values.items() if found}

    def kv_used_fraction(self) -> float | None:
        """Return the greatest of its gauges over all labels."""
        if not self._kv_gauge:
            return None
        _, text = http_get(port=self.endpoint.port, path="/metrics")
        return max(metric_values(text, self._kv_gauge), default=None)

    def failure(self) -> ServerFailedError | None:
        """Return why it ended, or None while it lives."""
        return None if self._process.exit_status is None else self._process.failure()

    def log_tail(self) -> str:
        """Return the end of its log."""
        return self._process.log_tail()

    def stop(self) -> None:
        """End the whole process group."""
        self._process.stop()


def launch(
    command: Sequence[str],
    deployment: Launch,
    *,
    port: int,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
) -> ServerProcess:
    """Start a server and return it once it answers; nothing is left running if it does not.

    Raises:
        ServerFailedError: With the end of its log.
    """
    process = ServerProcess(
        command, log_path=deployment.workdir / f"server-{port}.log", environment=environment
    )
    try:
        process.wait_healthy(port=port, limit_s=limit_s)
    except ServerFailedError as error:
        error.command = process.command_line
        process.stop()
        raise
    except BaseException:
        process.stop()
        raise
    return process


def run_build(
    command: Sequence[str],
    *,
    what: str,
    result: Path,
    log_path: Path,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program that builds something, to its end; nothing of it is left running.

    Args:
        command: Program and arguments.
        what: What is built, for messages, as `quantizing`.
        result: A file that is there afterwards.
        log_path: Where its output goes.
        limit_s: Time to end.
        environment: Variables beside the inherited ones.

    Raises:
        ServerFailedError: It fails, makes no result, or takes too long.
    """
    process = ServerProcess(command, log_path=log_path, environment=environment)
    try:
        status = process.wait_ended(limit_s=limit_s)
    except ServerFailedError as error:
        raise ServerFailedError(
            f"{what} {error.message}",
            kind=Failure.PREPARE_FAILED,
            log_tail=error.log_tail,
            hint="the time budget bounds builds too, and what is built once is kept",
        ) from error
    finally:
        process.stop()
    if status or not result.is_file():
        raise ServerFailedError(
            f"{what} ended with status {status} and {'a' if result.is_file() else 'no'} "
            f"{result.name}",
            kind=Failure.PREPARE_FAILED,
            log_tail=process.log_tail(),
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to build in, which replaces `target` at the end; a failure leaves none."""
    unfinished = target.with_name(f".{target.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def metric_values(text: str, metric: str) -> list[float]:
    """Return the finite values of a Prometheus metric over all labels."""
    return [sample.value for sample in _samples(text, metric)]


def labelled_values(text: str, metric: str, *, label: str) -> dict[str, float]:
    """Return the sums of a Prometheus metric by the value of one label."""
    found: dict[str, float] = {}
    for sample in _samples(text, metric):
        if label in sample.labels:
            name = sample.labels[label]
            found[name] = found.get(name, 0.0) + sample.value
    return found


def _samples(text: str, metric: str) -> list[Sample]:
    """Return a metric's finite samples; none where its lines are not Prometheus'.

    Only its own lines are parsed: the whole page of an engine takes milliseconds, in which the
    load generator beside it could not read.
    """
    lines = "\n".join(line for line in text.split("\n") if line.startswith(metric))
    try:
        families = list(text_string_to_metric_families(lines))
    except ValueError:
        return []
    samples = (sample for family in families for sample in family.samples)
    return [found for found in samples if found.name == metric and math.isfinite(found.value)]


def json_option(options: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return a backend's option that is a JSON object; empty where it is not given.

    Raises:
        ConfigError: Not a JSON object.
    """
    try:
        value = json.loads(options.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"--option {name} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--option {name} is not a JSON object", hint='write {"key": value}')
    return value


def facts_of_log(text: str, patterns: Mapping[str, LogPattern]) -> dict[str, float]:
    """Return the last number that each pattern finds, in base units."""
    facts = {}
    for name, (pattern, unit) in patterns.items():
        found = pattern.findall(text)
        if found:
            facts[name] = float(found[-1].replace(",", "")) * unit
    return facts


def program(deployment: Launch, default: str) -> list[str]:
    """Return the engine's program: option `command` where given, split at spaces."""
    return deployment.options.get("command", default).split()


def model_argument(deployment: Launch, folder: Path | None) -> str:
    """Return what the engine is told to load: a local folder, or the name on the hub."""
    return str(folder or deployment.model.folder or deployment.model.hub_name)
