"""A server as a group of processes: started, awaited, watched, and surely ended."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from executor.backend import Failure, ServerFailedError
from executor.guard import SIGNAL_STATUS
from executor.process_group import MARKER, POLITE_S, end_all, members

TAIL_LINES = 40
TAIL_CHARACTERS = 4000
"""How much of a log a stored run keeps."""

OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|OutOfMemoryError|error[^\n]*out of memory|cudaErrorMemoryAllocation"
    r"|No available memory for the cache blocks|less than desired GPU memory utilization"
    r"|larger than the available KV cache memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""What engines print when the GPU's memory does not suffice."""


class ServerProcess:
    """One server and everything that it has started.

    Args:
        command: Program and arguments.
        log_path: Where its output goes.
        environment: Variables beside the inherited ones.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = tuple(command)
        self.log_path = log_path
        self.server_id = uuid.uuid4().hex
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  what the person asked to run
                [sys.executable, "-m", "executor.guard", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(environment or {}, self.server_id),
            )

    @property
    def command_line(self) -> str:
        """The command as a person would type it."""
        return shlex.join(self.command)

    @property
    def exit_status(self) -> int | None:
        """Exit status (128 + n for signal n), or None while it runs."""
        return _shell_status(self._process.poll())

    @property
    def pids(self) -> list[int]:
        """All live processes of the server."""
        return members(self.server_id)

    def log_text(self) -> str:
        """Return everything that it has printed, without terminal colours."""
        try:
            text = self.log_path.read_text("utf-8", "replace")
        except OSError:
            return ""
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def log_tail(self) -> str:
        """Return the last lines that it has printed."""
        return tail(self.log_text())

    def wait_healthy(self, *, port: int, path: str = "/health", limit_s: float) -> None:
        """Return once the server answers.

        Raises:
            ServerFailedError: It ended, or did not answer in time.
        """
        until_s = time.monotonic() + limit_s
        while time.monotonic() < until_s:
            if self.exit_status is not None:
                raise self.failure(at_start=True)
            if http_get(port=port, path=path)[0] == http.client.OK:
                return
            time.sleep(0.1)
        raise ServerFailedError(
            f"no answer within {limit_s:g} s of its start",
            kind=Failure.START_TIMED_OUT,
            log_tail=self.log_tail(),
        )

    def wait_ended(self, *, limit_s: float) -> int:
        """Return the exit status of a program that ends by itself.

        Raises:
            ServerFailedError: It did not end in time.
        """
        try:
            return _shell_status(self._process.wait(limit_s)) or 0
        except subprocess.TimeoutExpired:
            raise ServerFailedError(
                f"did not end within {limit_s:g} s", kind=Failure.HUNG, log_tail=self.log_tail()
            ) from None

    def failure(self, *, at_start: bool = False) -> ServerFailedError:
        """Return why the server ended, from its log and its exit status."""
        text = self.log_text()
        how = described(self.exit_status)
        if OUT_OF_MEMORY.search(text):
            kind, message = Failure.OUT_OF_MEMORY, f"out of memory, {how}"
        elif at_start:
            kind, message = Failure.CRASHED_AT_START, f"{how} before it answered"
        else:
            kind, message = Failure.CRASHED, how
        return ServerFailedError(message, kind=kind, log_tail=tail(text))

    def stop(self, *, polite_s: float = POLITE_S) -> None:
        """End every process of the server; it is safe to call twice.

        Args:
            polite_s: Time to end after SIGTERM, before SIGKILL.

        Raises:
            ServerFailedError: Something of it cannot be ended.
        """
        ended = end_all(self.server_id, polite_s=polite_s)
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not ended:
            raise ServerFailedError(
                f"processes {self.pids} cannot be ended", kind=Failure.NOT_ENDED
            )
        self._process.wait()


def described(exit_status: int | None) -> str:
    """Return an exit status in words."""
    if exit_status is None:
        return "still running"
    if exit_status > SIGNAL_STATUS:
        number = exit_status - SIGNAL_STATUS
        return f"ended by {signal.Signals(number).name}" if number in _SIGNALS else "ended"
    return f"ended with status {exit_status}"


def tail(text: str) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.splitlines()[-TAIL_LINES:])[-TAIL_CHARACTERS:]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_get(
    *,
    port: int,
    path: str,
    host: str = "127.0.0.1",
    tls: bool = False,
    limit_s: float = 2.0,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Return status and text of a GET, or 0 and why nothing answers."""
    connection = http_connection(host, port, tls=tls, limit_s=limit_s)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, reply.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error)
    finally:
        connection.close()


def http_connection(
    host: str, port: int, *, tls: bool, limit_s: float
) -> http.client.HTTPConnection:
    """Return a connection that is not yet open; over TLS the certificate is checked."""
    if tls:
        return http.client.HTTPSConnection(host, port, timeout=limit_s)
    return http.client.HTTPConnection(host, port, timeout=limit_s)


def _shell_status(status: int | None) -> int | None:
    """Return an exit status as a shell has it: 128 + n for signal n."""
    return SIGNAL_STATUS - status if status is not None and status < 0 else status


_SIGNALS = {number.value for number in signal.Signals}


def _environment(extra: Mapping[str, str], server_id: str) -> dict[str, str]:
    """The guard runs from this installation, wherever the server's own packages lie.

    A process that sets its title writes it over the environment in which the marker is looked
    for, as vLLM's EngineCore does; SPT_NOENV makes setproctitle leave that alone.
    """
    home = str(Path(__file__).resolve().parents[1])
    path = extra.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "SPT_NOENV": "1",
        **extra,
        "PYTHONPATH": f"{path}{os.pathsep}{home}" if path else home,
        MARKER: server_id,
    }
