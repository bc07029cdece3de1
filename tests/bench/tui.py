"""How soon the interface paints and how fast it answers: `python -m tests.bench.tui`."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from textual.widgets import Input

from planner.tui.app import PlannerApp
from tests.bench import run_bench

REPEATS = 5
KEYS = 60

FIRST_PAINT = """
import sys
from pathlib import Path
from planner.tui.app import PlannerApp
from planner.tui.screens.plan import PlanScreen
# What the screen does right after its first paint is replaced by leaving.
PlanScreen._mount_figures = lambda screen: screen.app.exit()
PlannerApp(state_file=Path(sys.argv[1]) / "tui.json").run(headless=True, size=(120, 40))
"""


def first_paint_s() -> float:
    """Return the median time from process start to a painted frame, process end included."""
    times = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", FIRST_PAINT, folder], check=True)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


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
    rows = (
        ("first paint", f"{first_paint_s():.2f} s"),
        ("keystroke, median", f"{1e3 * statistics.median(times):.0f} ms"),
        ("keystroke, P95", f"{1e3 * times[int(0.95 * len(times))]:.0f} ms"),
    )
    for name, value in rows:
        print(f"{name:24} {value}")  # noqa: T201  a benchmark's output


if __name__ == "__main__":
    run_bench(main)
