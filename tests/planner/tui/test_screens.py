"""What the screens must show of a real plan on a small terminal; pictures: `test_pictures.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.widgets import Input

from planner.tui.catalogue import LocalGpus
from planner.tui.screens.measure import MeasureScreen
from planner.tui.screens.what_if import WhatIfScreen
from planner.tui.widgets.front_plot import FrontPlot
from planner.tui.widgets.knob_list import NAME_WIDTH, KnobList
from tests.planner.tui import stand_in_work
from tests.planner.tui.driving import SMALL, app_of, planned, planner_at, sees, shown, until
from tests.planner.tui.stand_in_work import answer_everything

pytestmark = pytest.mark.asyncio


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


async def test_keys_and_mouse_reach_what_a_small_screen_hides(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL) as pilot:
        screen = await planned(pilot)
        await pilot.press("pagedown", "pagedown")
        await sees(pilot, "expected loss")
        await pilot.click("#field-gpu", offset=(25, 0))
        await sees(pilot, "GPU: type to narrow", "auto")
        await pilot.press("escape", "ctrl+g")
        front = screen.query_one(FrontPlot)
        await pilot.click("#front #plot", offset=(2, 2))
        await until(pilot, lambda: front.cursor == 0)


async def test_the_palette_offers_what_the_screen_can_do(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f3", "ctrl+p", *"reset")
        await sees(pilot, "Reset all", "^r on this screen")


async def test_question_mark_shows_keys_where_a_path_is_typed(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f6", "question_mark")
        await sees(pilot, "Keys of this screen")


async def test_a_click_steps_a_knob(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL) as pilot:
        await planned(pilot)
        await pilot.press("f3")
        knobs = pilot.app.screen.query_one(KnobList)
        await until(pilot, lambda: knobs.option_count > 0)
        row = knobs.get_option_index("kv_cache_dtype")
        await pilot.click("#knobs", offset=(NAME_WIDTH, row))
        await sees(pilot, "was fp8", "Changed: kv_cache_dtype=")


async def test_a_field_too_narrow_for_its_text_shows_it_below(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL) as pilot:
        await planned(pilot)
        pilot.app.screen.query_one("#field-slo Input").focus()
        await sees(pilot, "tpot_ms.p99=50")
        await pilot.press("tab")
        await until(pilot, lambda: "tpot_ms.p99=50" not in shown(pilot))
        assert app_of(pilot).session is not None


@pytest.mark.parametrize("gpu", ["", "l40s"])
async def test_the_first_start_plans_for_the_gpus_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    answer_everything(monkeypatch)
    local = LocalGpus(profile="h200_sxm", count=2, words="this machine: 2 × NVIDIA H200")
    monkeypatch.setattr(stand_in_work, "LOCAL", local)
    async with planner_at(tmp_path, gpu=gpu) as pilot:
        await until(pilot, lambda: bool(app_of(pilot).catalogue.entries))
        form = [pilot.app.screen.query_one(f"#field-{n} Input", Input) for n in ("gpu", "num_gpus")]
        expected = [gpu, "1"] if gpu else ["h200_sxm", "2"]
        await until(pilot, lambda: [text.value for text in form] == expected)
        await pilot.press("down")
        await sees(pilot, "this machine: 2 × NVIDIA H200")
