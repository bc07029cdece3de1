"""Writes the README's pictures from the interface itself: `python -m tests.bench.screenshots`."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

from textual.pilot import Pilot
from textual.widgets import Input

from planner.tui.screens.calibrate import CalibrateScreen
from planner.tui.screens.measure import MeasureScreen
from planner.tui.screens.what_if import WhatIfScreen
from planner.tui.widgets.candidate_list import CandidateList
from tests.planner.tui.driving import picture, planned, planner_at, shown, until

ROOT = Path(__file__).parents[2]


async def take(folder: Path) -> None:
    """Go through the screens and write a picture of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state, chdir(state):
        for name in ("tests", "profiles"):
            Path(name).symlink_to(ROOT / name)
        async with planner_at(Path(state), effort={}) as pilot:
            await planned(pilot)
            await _write(pilot, folder / "plan.svg")
            await _what_if(pilot)
            await _write(pilot, folder / "what-if.svg")
            await _measure(pilot)
            await _write(pilot, folder / "measure.svg")
            await _calibrate(pilot)
            await _write(pilot, folder / "calibrate.svg")


async def _what_if(pilot: Pilot[int]) -> None:
    await pilot.press("f3")
    screen = pilot.app.screen
    assert isinstance(screen, WhatIfScreen)
    await until(pilot, lambda: screen.simulated is not None)
    await pilot.press("right", "v")
    await until(pilot, lambda: bool(screen.settings) and screen.simulated is not None)


async def _measure(pilot: Pilot[int]) -> None:
    await pilot.press("f5")
    screen = pilot.app.screen
    assert isinstance(screen, MeasureScreen)
    await until(pilot, lambda: bool(screen.backends))
    values = {
        "model": "tests/data/tiny-llama", "workload": "tests/data/few.json", "requests": "2000",
        "repeats": "2", "settings": "max_batch_size=4 max_num_tokens=64 tokens_per_block=16",
    }  # fmt: skip
    for name, value in values.items():
        screen.query_one(f"#field-{name} Input", Input).value = value
    candidates = screen.query_one(CandidateList)
    candidates.mark_only(len(candidates.names) - 1)
    await pilot.press("ctrl+r")
    await until(pilot, lambda: not screen.is_measuring or "run 2" in screen.live.phase, 120)
    await until(pilot, lambda: not screen.is_measuring, 120)


async def _calibrate(pilot: Pilot[int]) -> None:
    await pilot.press("f7")
    screen = pilot.app.screen
    assert isinstance(screen, CalibrateScreen)
    field = screen.query_one("#runs-file", Input)
    field.value = "profiles/runs/h200_vllm/runs.jsonl"
    field.focus()
    await pilot.press("enter")
    await until(pilot, lambda: " runs predicted" in shown(pilot))


async def _write(pilot: Pilot[int], path: Path) -> None:
    await pilot.pause(0.5)
    path.write_text(await picture(pilot, title="planner tui"), encoding="utf-8")
    print(f"{path} {path.stat().st_size / 1024:.0f} KB")  # noqa: T201  a program's output


if __name__ == "__main__":
    asyncio.run(
        take(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "docs" / "screenshots")
    )
