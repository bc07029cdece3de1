"""From plan to what-if to files; runs, calibrations and profiles; keys and themes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from textual.pilot import Pilot
from textual.widgets import DataTable, Input

from planner.tui.screens import what_if
from planner.tui.screens.what_if import WhatIfScreen
from planner.tui.widgets.knob_list import KnobList
from planner.tui.widgets.sensitivity_plot import SensitivityPlot
from planner.what_if import ask
from tests.planner.tui.driving import (
    SMALL,
    app_of,
    plain,
    planned,
    planner_at,
    sees,
    shown,
    text_of,
    typed,
    until,
)

pytestmark = pytest.mark.asyncio

RUNS = Path(__file__).parents[3] / "profiles" / "runs" / "h200_vllm" / "runs.jsonl"


async def test_plan_then_what_if_then_export(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        await pilot.press("f3")
        screen = pilot.app.screen
        assert isinstance(screen, WhatIfScreen)
        await until(pilot, lambda: screen.answer is not None)
        _highlight(screen, "max_num_tokens")
        await pilot.press("left", "left", "left")
        await until(pilot, lambda: "▼ highest rate" in text_of(pilot, "#differences"))
        await until(pilot, lambda: "was 8192" in shown(pilot))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "Export to a folder" in shown(pilot))
        pilot.app.screen.query_one(Input).value = str(folder)
        await pilot.press("enter")
        await until(pilot, (folder / "plan.json").exists)
        options = yaml.safe_load((folder / "llm_api_options.yaml").read_text())
        assert options["max_num_tokens"] == 1024
        exported = json.loads((folder / "plan.json").read_text())
        assert exported["recommended"]["config"]["max_num_tokens"] == 1024


async def test_what_if_says_the_numbers_of_the_use_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(what_if, "DEBOUNCE_S", 600.0)  # no simulation takes the figures' place
    async with planner_at(tmp_path) as pilot:
        screen = await _what_if(pilot)
        session = app_of(pilot).session
        assert session is not None
        _highlight(screen, "max_num_tokens")
        await pilot.press("left", "left", "left")
        await until(pilot, lambda: "▼" in text_of(pilot, "#differences"))
        await sees(pilot, "Closed form; the simulation follows")
        knob = screen.query_one(KnobList).knob
        base = session.plan.recommended.deployment
        value = {knob: screen.settings[knob]}
        expected = ask(session.problem, base, value).prediction.highest_rate_per_s
        assert f"→ {expected:.4g} requests/s" in text_of(pilot, "#differences")


async def test_values_that_cannot_be_taken_are_said_so(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        screen = await _what_if(pilot)
        _highlight(screen, "max_num_tokens")
        await pilot.press("enter", "end", "ctrl+u", *typed("many"))
        await until(pilot, lambda: "it must be a whole number" in shown(pilot))
        await pilot.press("end", "ctrl+u", *typed("0"), "enter")
        await until(pilot, lambda: "max_num_tokens=0 is out of range" in shown(pilot))
        assert "max_num_tokens" not in screen.settings
        await pilot.press("enter", "end", "ctrl+u", *typed("64"), "enter")
        await until(pilot, lambda: "✗ not deployable" in text_of(pilot, "#differences"))
        await pilot.press("ctrl+r")
        await until(pilot, lambda: "not deployable" not in text_of(pilot, "#differences"))


async def test_curve_follows_the_knob_and_the_metric(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL) as pilot:
        screen = await _what_if(pilot)
        curve = screen.query_one(SensitivityPlot)
        _highlight(screen, "max_batch_size")
        await until(pilot, lambda: curve.knob == "max_batch_size")
        rates = [p.prediction.highest_rate_per_s for p in curve.points if p.prediction]
        assert rates == sorted(rates)
        before = curve.border_title
        await pilot.press("m")
        assert curve.border_title != before
        await until(pilot, lambda: "max_batch_size" in shown(pilot))


async def test_what_if_without_a_plan_says_where_to_get_one(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f3")
        await until(pilot, lambda: "There is no plan yet" in shown(pilot))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "nothing to export" in shown(pilot))


async def test_export_into_a_foreign_folder_is_refused_at_the_field(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        await pilot.press("ctrl+s")
        pilot.app.screen.query_one(Input).value = str(tmp_path / "mine")
        await pilot.press("enter")
        await until(pilot, lambda: bool(text_of(pilot, "#export-problem").strip()))
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


async def test_runs_stand_beside_their_predictions(tmp_path: Path) -> None:
    count = 4
    path = _first_runs(count, tmp_path)
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f6")
        pilot.app.screen.query_one("#runs-file", Input).value = str(path)
        await pilot.press("enter")
        await until(pilot, lambda: f"{count} runs, predicted / measured" in shown(pilot))
        table = pilot.app.screen.query_one(DataTable)
        assert table.row_count == count
        await pilot.press("c", "down")
        await until(pilot, lambda: text_of(pilot, "#run").count("predicted") == 2)
        await pilot.press("f7")
        await until(pilot, lambda: "MAPE %" in shown(pilot))
        assert "In force" in plain(pilot.app.screen.query_one("#in-force"))


async def test_missing_and_damaged_runs_are_answered_at_the_field(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("{not json\n")
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f6")
        await _open_runs(pilot, tmp_path / "none.jsonl")
        await until(pilot, lambda: "no such file" in text_of(pilot, "#runs-words"))
        await _open_runs(pilot, damaged)
        await until(pilot, lambda: "is not JSON" in text_of(pilot, "#runs-words"))


async def test_profiles_are_searched_and_compared(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await until(pilot, lambda: bool(app_of(pilot).catalogue.entries))
        await pilot.press("f4", "slash", *typed("gpu h200"), "enter")
        await until(pilot, lambda: "memory_bytes" in text_of(pilot, "#current"))
        await pilot.press("c", "slash", "end", "ctrl+u", *typed("gpu b200"), "enter")
        await until(pilot, lambda: text_of(pilot, "#current").startswith("b200_sxm"))
        await until(pilot, lambda: text_of(pilot, "#kept").startswith("h200_sxm"))


async def test_question_mark_shows_the_keys_of_the_screen(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL, workload="nothing") as pilot:
        await pilot.press("question_mark")
        await until(pilot, lambda: "Keys of this screen" in shown(pilot))
        await until(pilot, lambda: "esc Stop" in shown(pilot))
        await pilot.press("escape")
        await until(pilot, lambda: "Keys of this screen" not in shown(pilot))


async def test_every_theme_can_be_chosen_by_key(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        seen = set()
        for _ in range(3):
            await pilot.press("ctrl+t")
            seen.add(pilot.app.theme)
        assert seen == {"planner-dark", "planner-light", "planner-monochrome"}


async def _what_if(pilot: Pilot[int]) -> WhatIfScreen:
    await planned(pilot)
    await pilot.press("f3")
    screen = pilot.app.screen
    assert isinstance(screen, WhatIfScreen)
    await until(pilot, lambda: screen.answer is not None)
    _highlight(screen, "max_batch_size")
    return screen


def _highlight(screen: WhatIfScreen, knob: str) -> None:
    knobs = screen.query_one(KnobList)
    knobs.highlighted = knobs.get_option_index(knob)


def _first_runs(count: int, folder: Path) -> Path:
    """Write a file of the first runs, with their requests where they lie."""
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()[:count]]
    for run in runs:
        run["workload"]["requests_file"] = str(RUNS.parent / run["workload"]["requests_file"])
    path = folder / "runs.jsonl"
    path.write_text("\n".join(map(json.dumps, runs)))
    return path


async def _open_runs(pilot: Pilot[int], path: Path) -> None:
    pilot.app.screen.query_one("#runs-file", Input).value = str(path)
    await pilot.press("enter")
