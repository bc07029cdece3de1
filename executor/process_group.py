"""Finds and ends every process that a server has started, also those that left its group."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARKER = "PLANNER_SERVER_ID"
"""Environment variable that a server's processes inherit; launchers such as mpirun open
sessions of their own, so that the session alone does not find all of them."""

POLITE_S = 10.0
"""Time to end after SIGTERM, before SIGKILL."""

SURE_S = 10.0
"""Time for the kernel to take down what was killed."""


def members(server_id: str) -> list[int]:
    """Return the live processes that carry a server's marker, without the calling one."""
    wanted = f"{MARKER}={server_id}".encode()
    return [pid for pid in _processes() if pid != os.getpid() and _carries(pid, wanted)]


def end_all(server_id: str, *, polite_s: float = POLITE_S) -> bool:
    """End every process of a server, politely and then surely; return whether none is left."""
    for number, limit_s in ((signal.SIGTERM, polite_s), (signal.SIGKILL, SURE_S)):
        until_s = time.monotonic() + limit_s
        _signal(members(server_id), number)
        while time.monotonic() < until_s:
            left = members(server_id)
            if not left:
                return True
            if number == signal.SIGKILL:
                _signal(left, number)
            time.sleep(0.05)
    return not members(server_id)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _processes() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _carries(pid: int, wanted: bytes) -> bool:
    try:
        if wanted not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return False
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
