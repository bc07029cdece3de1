"""How soon the interface paints and how fast it answers: `python -m tests.bench.tui`."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import statistics
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

from textual.widgets import Input

from planner.tui.app import PlannerApp
from tests.bench import run_bench

REPEATS = 5
KEYS = 60

LAST_PAINTED = b"Objective"
"""The form's last field: once it is there, so is the frame."""


def first_paint_s(size: tuple[int, int], folder: str) -> tuple[float, float]:
    """Return time and CPU time from process start to a painted frame, in a terminal of a size."""
    pid, terminal = pty.fork()
    if pid == 0:
        settings = {"XDG_CONFIG_HOME": folder, "TERM": "xterm-256color"}
        program = [sys.executable, "-m", "planner", "tui"]
        os.execve(sys.executable, program, {**os.environ, **settings})  # noqa: S606  our own
    start = time.perf_counter()
    columns, rows = size
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    painted = b""
    while LAST_PAINTED not in painted:
        painted += os.read(terminal, 65536)
    wall_s = time.perf_counter() - start
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    return wall_s, cpu_s


async def keystroke_s() -> list[float]:
    """Return the time that each keystroke takes while searches run."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        app = PlannerApp(state_file=Path(folder) / "tui.json")
        async with app.run_test(size=(120, 40)):
            await asyncio.sleep(2)
            field = app.screen.query_one("#field-rate Input", Input)
            field.focus()
            for number in range(KEYS):
                times.append(await _answer_s(app, field, number))
                # Long enough a pause for a search to start now and then.
                await asyncio.sleep(0.4 if number % 5 == 0 else 0.1)
    return times


async def _answer_s(app: PlannerApp, field: Input, number: int) -> float:
    """Return the time from a key to the repainted field; Pilot's own wait sees other threads."""
    before, painted = field.value, asyncio.Event()
    start = time.perf_counter()
    app.simulate_key("backspace" if number % 2 else str(1 + number % 9))
    while field.value == before:
        await asyncio.sleep(0.001)
    field.call_after_refresh(painted.set)
    await painted.wait()
    return time.perf_counter() - start


def main() -> None:
    """Print every figure."""
    times = sorted(asyncio.run(keystroke_s()))
    rows = [
        ("keystroke, median", f"{1e3 * statistics.median(times):.0f} ms"),
        ("keystroke, P95", f"{1e3 * times[int(0.95 * len(times))]:.0f} ms"),
    ]
    for size in ((80, 24), (120, 40)):
        with tempfile.TemporaryDirectory() as folder:
            found = [first_paint_s(size, folder) for _ in range(REPEATS)]
        wall_s, cpu_s = (statistics.median(column) for column in zip(*found, strict=True))
        name = f"first paint {size[0]}×{size[1]}"
        rows.append((name, f"{wall_s:.2f} s, {cpu_s:.2f} s of it the CPU's"))
    for name, value in rows:
        print(f"{name:24} {value}")  # noqa: T201  a benchmark's output


if __name__ == "__main__":
    run_bench(main)
