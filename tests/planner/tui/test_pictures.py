"""What every screen shows at both sizes; four of them equal to the last letter to kept pictures.

`python -m pytest -n 0 tests/planner/tui/test_pictures.py --snapshot-update` draws them anew;
look at the difference before it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from textual.pilot import Pilot
from textual.widgets import Input

from planner.tui.screens.what_if import WhatIfScreen
from planner.tui.widgets.candidate_list import CandidateList
from planner.tui.widgets.front_plot import FrontPlot
from tests.planner.tui.driving import SMALL, WIDE, picture, plain, planned, planner_at, sees, until
from tests.planner.tui.stand_in_work import KNOBS, answer_everything

pytestmark = pytest.mark.asyncio


NO_HUE = 3
"""Greys differ by so much: the frame's is #c5c8c6."""


class Svg(SingleFileSnapshotExtension):
    """One file a picture."""

    file_extension = "svg"
    _write_mode = WriteMode.TEXT


@pytest.fixture(autouse=True)
def _written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_everything(monkeypatch)


async def plan(pilot: Pilot[int]) -> None:
    front = pilot.app.screen.query_one(FrontPlot)
    await until(pilot, lambda: "★" in plain(front.canvas) and "+" in plain(front.canvas))


async def plan_cursor(pilot: Pilot[int]) -> None:
    await pilot.press("ctrl+g", "left")
    await sees(pilot, "◆ 9,822 tok/s/GPU")


async def gpu_list(pilot: Pilot[int]) -> None:
    await pilot.press("down")
    await sees(pilot, "NVML finds no NVIDIA GPU")


async def what_if(pilot: Pilot[int]) -> None:
    await pilot.press("f3", *["down"] * KNOBS.index("max_batch_size"), "left")
    await sees(pilot, "▼ highest rate", "was 256", "Closed form: nothing can be simulated")


async def kv_blocks(pilot: Pilot[int]) -> None:
    await what_if(pilot)
    screen = pilot.app.screen
    assert isinstance(screen, WhatIfScreen)
    while "KV" not in screen.view:
        await pilot.press("v")
    await sees(pilot, "KV blocks of 31,250")


async def profiles(pilot: Pilot[int]) -> None:
    await pilot.press("f4", "c", "down")
    await sees(pilot, "h200_sxm", "schema_version")


async def measure(pilot: Pilot[int]) -> None:
    await pilot.press("f5")
    await until(pilot, lambda: bool(pilot.app.screen.query_one(CandidateList).names))
    await pilot.press("ctrl+r")
    await sees(pilot, "2 runs are in", "predicted")


async def runs(pilot: Pilot[int]) -> None:
    await _open_runs(pilot, "f6")
    await pilot.press("c", "down")
    await sees(pilot, "differ in", "concurrency")


async def calibrate(pilot: Pilot[int]) -> None:
    await _open_runs(pilot, "f7")
    await pilot.press("ctrl+r")
    await sees(pilot, "Before and after")


async def diagnosis(pilot: Pilot[int]) -> None:
    await _open_runs(pilot, "f6")
    await pilot.press("d")
    await sees(pilot, "Diagnosis of run-1", "free_gpu_memory_fraction")


async def ladder(pilot: Pilot[int]) -> None:
    await pilot.press("ctrl+l")
    await sees(pilot, "ServerLease on: BF16", "OVER")


async def keys(pilot: Pilot[int]) -> None:
    await pilot.press("f3", "question_mark")
    await sees(pilot, "Keys of this screen")


SCREENS = (
    plan, plan_cursor, gpu_list, what_if, kv_blocks, profiles, measure, runs, calibrate,
    diagnosis, ladder, keys,
)  # fmt: skip


PICTURES = ((plan, SMALL), (plan, WIDE), (what_if, WIDE), (runs, SMALL))
"""Kept to the last letter: the frame, the plot, the knobs and a table."""

Go = Callable[[Pilot[int]], Awaitable[None]]


@pytest.mark.parametrize("size", [SMALL, WIDE], ids=["80x24", "120x40"])
@pytest.mark.parametrize("go", SCREENS, ids=lambda go: go.__name__)
async def test_every_screen_shows_what_it_is_for(
    tmp_path: Path, go: Go, size: tuple[int, int]
) -> None:
    async with planner_at(tmp_path, size) as pilot:
        await planned(pilot)
        await plan(pilot)
        await go(pilot)  # waits for the words that a person looks for


@pytest.mark.parametrize(
    ("go", "size"), PICTURES, ids=[f"{go.__name__}-{size[0]}x{size[1]}" for go, size in PICTURES]
)
async def test_screen_looks_as_it_did(
    tmp_path: Path, snapshot: SnapshotAssertion, go: Go, size: tuple[int, int]
) -> None:
    async with planner_at(tmp_path, size) as pilot:
        await planned(pilot)
        await plan(pilot)
        await go(pilot)
        assert await picture(pilot) == snapshot(extension_class=Svg)


async def test_in_monochrome_no_hue_is_left(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        pilot.app.theme = "planner-monochrome"
        await what_if(pilot)
        styles = (await picture(pilot)).partition("</style>")[0]
        colours = set(re.findall(r"fill: #([0-9a-f]{6})", styles))
        assert len(colours) > 3
        assert not [colour for colour in colours if _hue(colour) > NO_HUE]


def _hue(colour: str) -> int:
    """Return by how much the parts of a colour differ, of 255."""
    parts = bytes.fromhex(colour)
    return max(parts) - min(parts)


async def _open_runs(pilot: Pilot[int], key: str) -> None:
    await pilot.press(key)
    field = pilot.app.screen.query_one("#runs-file", Input)
    field.value = "runs.jsonl"
    field.focus()
    await pilot.press("enter")
    await sees(pilot, "6 runs")
