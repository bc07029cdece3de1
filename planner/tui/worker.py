"""A process of its own for heavy work: the screen answers while it goes on.

Threads would share the interpreter with the screen, and a measurement's clock with both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

from cost_models.errors import PlannerError

STOP = "stop"

POLL_S = 0.03
"""How often it is asked whether the work shall stop."""


class WorkFailedError(PlannerError):
    """Work in another process failed; the message says why."""


class Link(Protocol):
    """What a function that runs in a worker has of the side that called it."""

    def report(self, message: Any) -> None:
        """Tell something before the end; any thread may."""

    def is_stopped(self) -> bool:
        """Return whether the caller wants the work to end."""


class Worker:
    """One process that does one piece of work after another; started at the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None

    @property
    def pid(self) -> int | None:
        """The process, or None before the first work."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Bring the process up, so that the first work need not wait for it."""
        with self._lock:
            self._ready()

    def abandon(self) -> bool:
        """End the process if it works; return whether it did. Who waits is told that it died."""
        if not self._lock.locked() or self._process is None:
            return False
        self._process.kill()
        return True

    def close(self) -> None:
        """End the process; the next work starts another. Work at hand is waited for."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            if self._process is not None:
                self._process.wait()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        heard: Callable[[Any], None] = lambda _message: None,
        stop: threading.Event | None = None,
    ) -> Any:
        """Return what `function(link, *arguments)` returns over there; blocks: call in a thread.

        Args:
            function: Importable by name; its first argument is its `Link`.
            arguments: What can be pickled.
            heard: Told what the function reports.
            stop: Asks the function to end; how soon it does is up to it.

        Raises:
            WorkFailedError: The function failed, or its process died.
        """
        with self._lock:
            connection = self._ready()
            try:
                connection.send((function, arguments))
                return _answer(connection, heard, stop)
            except (EOFError, ConnectionError):
                raise WorkFailedError(self._death()) from None

    def _ready(self) -> Connection[Any, Any]:
        if self._connection is None or self._process is None or self._process.poll() is not None:
            here, there = Pipe()
            with there:
                self._process = subprocess.Popen(  # noqa: S603  our own module
                    [sys.executable, "-m", "planner.tui.worker", str(there.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[there.fileno()],
                )
            self._connection = here
        return self._connection

    def _death(self) -> str:
        status = self._process.wait() if self._process else None
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        if status is not None and status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"


_workers: dict[str, Worker] = {}
"""By name; they outlive a screen, and end with the program."""


def worker(name: str) -> Worker:
    """Return the worker of a kind of work, for example `search` or `measure`."""
    return _workers.setdefault(name, Worker())


def abandon_work(*names: str) -> None:
    """End what some workers do: the program ends, and nobody waits for it any more."""
    for name in names:
        if name in _workers:
            _workers[name].abandon()


def _answer(
    connection: Connection[Any, Any], heard: Callable[[Any], None], stop: threading.Event | None
) -> Any:
    is_told = False
    while True:
        if stop is not None and stop.is_set() and not is_told:
            connection.send(STOP)
            is_told = True
        if not connection.poll(POLL_S):
            continue
        kind, value = connection.recv()
        if kind == "said":
            heard(value)
        elif kind == "failed":
            raise WorkFailedError(value)
        else:
            return value


class _Link:
    """The worker's end."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._is_stopped = False

    def report(self, message: Any) -> None:
        self.send("said", message)

    def is_stopped(self) -> bool:
        with self._lock:
            while not self._is_stopped and self._connection.poll():
                self._is_stopped = self._connection.recv() == STOP
            return self._is_stopped

    def send(self, kind: str, value: Any) -> None:
        with self._lock:
            self._connection.send((kind, value))


def serve(connection: Connection[Any, Any]) -> None:
    """Do what comes until the other side is gone."""
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        if work == STOP:
            continue  # meant for work that had ended
        link = _Link(connection)
        try:
            link.send("done", work[0](link, *work[1]))
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # noqa: BLE001  the process's edge
            link.send("failed", str(error) or repr(error))


def interrupt_when(condition: Callable[[], bool], *, every_s: float = 0.2) -> threading.Event:
    """Interrupt this process's main thread once a condition holds; setting the event ends it."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            try:
                holds = condition()
            except (EOFError, OSError):
                holds = True  # nobody is there any more who could want the result
            if holds:
                os.kill(os.getpid(), signal.SIGINT)
                return

    threading.Thread(target=watch, daemon=True).start()
    return ended


def main() -> None:
    """Serve on the descriptor that the command line names."""
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
