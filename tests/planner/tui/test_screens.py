"""Each screen at both sizes: the text of its empty state, and what a filled one must show.

`PLANNER_UPDATE_SNAPSHOTS=1` writes the expected texts anew; look at the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from textual.pilot import Pilot

from planner.tui.screens.measure import MeasureScreen
from planner.tui.screens.what_if import WhatIfScreen
from tests.planner.tui.driving import (
    SMALL,
    WIDE,
    app_of,
    planned,
    planner_at,
    problem_at,
    shown,
    until,
)  # fmt: skip

pytestmark = pytest.mark.asyncio

SNAPSHOTS = Path(__file__).parent / "snapshots"

KEYS = {
    "plan": "f2", "what_if": "f3", "profiles": "f4", "measure": "f5", "runs": "f6",
    "calibrate": "f7",
}  # fmt: skip


@pytest.mark.parametrize("size", [SMALL, WIDE], ids=["80x24", "120x40"])
async def test_empty_screens_look_as_they_did(tmp_path: Path, size: tuple[int, int]) -> None:
    differing = []
    async with planner_at(tmp_path, size, workload="nothing") as pilot:
        await until(pilot, lambda: bool(problem_at(pilot, "workload")))
        await until(pilot, lambda: bool(app_of(pilot).catalogue.entries))
        for name, key in KEYS.items():
            await pilot.press(key)
            await _settled(pilot)
            if name == "measure" and "transformers" in _refused(pilot):
                continue  # then it says so at the field
            # What lists every profile, and installed versions, changes for other reasons.
            text = "\n".join(shown(pilot).splitlines()[: 6 if name == "profiles" else None]) + "\n"
            path = SNAPSHOTS / f"{name}-{size[0]}x{size[1]}.txt"
            if os.environ.get("PLANNER_UPDATE_SNAPSHOTS"):
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            if text != path.read_text(encoding="utf-8"):
                differing.append(f"{path.name}:\n{text}")
    assert not differing, "\n".join(differing)


async def test_filled_screens_show_what_matters(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL) as pilot:
        await planned(pilot)
        await until(pilot, lambda: "max_batch_size" in shown(pilot))
        await pilot.press("f3")
        screen = pilot.app.screen
        assert isinstance(screen, WhatIfScreen)
        await until(pilot, lambda: screen.simulated is not None)
        await until(pilot, lambda: "Simulated" in shown(pilot))
        await until(pilot, lambda: "quantization" in shown(pilot))
        await pilot.press("f5")
        assert isinstance(pilot.app.screen, MeasureScreen)
        await until(pilot, lambda: "[x] fp8" in shown(pilot))


def _refused(pilot: Pilot[int]) -> dict[str, str]:
    screen = pilot.app.screen
    return screen.refused if isinstance(screen, MeasureScreen) else {}


async def _settled(pilot: Pilot[int]) -> None:
    screen = pilot.app.screen
    if isinstance(screen, MeasureScreen):
        await until(pilot, lambda: bool(screen.backends))
    await pilot.pause(0.1)
