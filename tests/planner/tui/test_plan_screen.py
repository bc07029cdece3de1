"""The plan screen: recommendation, front, bad input at each field, stop, failure."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from planner import api
from planner.text.lines import front_lines, fusion_lines, loss_words, scheduling_lines
from planner.tui.state import load_state
from planner.tui.widgets.front_plot import FrontPlot
from planner.tui.worker import worker
from tests.planner.tui.driving import (
    FEW_TRIALS,
    SMALL,
    WIDE,
    app_of,
    fill,
    plain,
    planned,
    planner_at,
    problem_at,
    sees,
    shown,
    text_of,
    typed,
    until,
)
from tests.planner.tui.stand_in_work import answer_everything

pytestmark = pytest.mark.asyncio


async def test_recommends_what_the_command_recommends(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        session = app_of(pilot).session
        assert session is not None
        request = api.PlanRequest(gpu="h100", workload="chat", trials=FEW_TRIALS["trials"])
        best = api.plan(request).recommended
        assert session.plan.recommended.config == best.config
        await until(
            pilot, lambda: best.config.capacity_scheduler_policy in text_of(pilot, "#config")
        )
        await until(pilot, lambda: "Binding limit" in text_of(pilot, "#prediction"))


@pytest.mark.parametrize("size", [SMALL, WIDE])
async def test_shows_form_and_recommendation_at_both_sizes(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    async with planner_at(tmp_path, size) as pilot:
        await planned(pilot)
        await sees(pilot, "GPU", "Objective", "★ Recommended", "max_batch_size", "? Keys")
        assert ("Binding limit" in shown(pilot)) == (size == WIDE)


async def test_small_screen_scrolls_to_the_reasons(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL) as pilot:
        screen = await planned(pilot)
        screen.query_one("#results").focus()
        for _ in range(12):
            if "Changing one knob" in shown(pilot):
                return
            await pilot.press("pagedown")
        raise AssertionError(shown(pilot))


ENDLESS = {"trials": 100_000, "time_budget_s": 600.0}

UNREADABLE = {
    "gpu": ("h1000", "unknown; did you mean"),
    "num_gpus": ("many", "not a whole number"),
    "workload": ("chatt", "did you mean chat"),
    "model": ("llama-9", "is unknown"),
    "rate": ("fast", "not a number"),
    "slo": ("ttft=5", "is unknown"),
    "max_quality_loss": ("little", "not a number"),
    "objective": ("speed", "known: goodput"),
}
"""Answered all at once."""

IMPOSSIBLE = {
    "num_gpus": ("9", "accepted: 1 to 8"),
    "rate": ("0", "above 0"),
    "isl": ("0.5", "accepted: 1 to"),
    "osl": ("-3", "accepted: 1 to"),
    "slo": ("ttft_ms.p99", "is not knob=value"),
    "max_quality_loss": ("-1", "below 0"),
}
"""Seen once every field can be read."""


async def test_bad_input_is_answered_at_its_field(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        fields = {n: pilot.app.screen.query_one(f"#field-{n} Input", Input) for n in UNREADABLE}
        good = {name: field.value for name, field in fields.items()}
        for name, (text, _) in UNREADABLE.items():
            await fill(pilot, name, text)
        for name, (_, words) in UNREADABLE.items():
            await until(pilot, partial(_says, pilot, name, words))
        assert "Not searched" in text_of(pilot, "#headline")
        for name, field in fields.items():
            field.value = good[name]
        for name, (text, words) in IMPOSSIBLE.items():
            await fill(pilot, name, text)
            await until(pilot, partial(_says, pilot, name, words))
            assert "Not searched" in text_of(pilot, "#headline")
            await fill(pilot, name, good.get(name, ""))


async def test_mended_input_searches_again(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        await fill(pilot, "rate", "x")
        await until(pilot, lambda: bool(problem_at(pilot, "rate")))
        await fill(pilot, "rate", "2")
        await planned(pilot)
        assert not problem_at(pilot, "rate")
        session = app_of(pilot).session
        assert session is not None
        assert session.problem.workload.arrival.rate_per_s == 2


async def test_empty_field_shows_what_the_workload_gives(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="rag") as pilot:
        await planned(pilot)
        session = app_of(pilot).session
        assert session is not None
        field = pilot.app.screen.query_one("#field-model Input", Input)
        assert (field.value, field.placeholder) == ("", session.problem.model.name)


async def test_list_narrows_while_typing_and_fills_the_field(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        await until(pilot, lambda: bool(app_of(pilot).catalogue.entries))
        pilot.app.screen.query_one("#field-gpu Input", Input).focus()
        await pilot.press("down", *typed("h200"), "enter")
        assert pilot.app.screen.query_one("#field-gpu Input", Input).value == "h200_sxm"
        await until(pilot, lambda: _gpu(pilot) == "h200_sxm")


async def test_tables_follow_the_cursor_of_the_front(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        screen = await planned(pilot)
        front = screen.query_one(FrontPlot)
        await pilot.press("ctrl+g", "right", "right")
        assert front.cursor is not None
        config = front.candidates[front.cursor].config
        await until(pilot, lambda: "◆" in text_of(pilot, "#headline"))
        rows = [line.split() for line in text_of(pilot, "#config").splitlines()]
        assert ["max_batch_size", str(config.max_batch_size)] in rows
        await pilot.press("r")
        await planned(pilot)


async def test_infeasible_slo_says_what_it_would_take(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        await fill(pilot, "slo", "tpot_ms.p99=0.01")
        await until(pilot, lambda: "Nothing is feasible" in text_of(pilot, "#headline"))
        reasons = plain(pilot.app.screen.query_one("#reasons"))
        assert "to be feasible: tpot_ms.p99 from 0.01" in " ".join(reasons.split())


async def test_limit_on_quality_loss_holds_in_the_plan(tmp_path: Path) -> None:
    async with planner_at(tmp_path, max_quality_loss="0.3") as pilot:
        await planned(pilot)
        session = app_of(pilot).session
        assert session is not None
        assert session.request.max_quality_loss_pct == 0.3
        recommended = session.plan.recommended
        assert recommended.quality.loss_pct <= 0.3
        assert loss_words(recommended.quality) in " ".join(text_of(pilot, "#prediction").split())
        assert "quality_loss_pct" in text_of(pilot, "#prediction")
    assert load_state(tmp_path / "tui.json")[0].question.max_quality_loss == "0.3"


async def test_right_side_says_what_the_command_says_of_the_techniques(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_everything(monkeypatch)
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        session = app_of(pilot).session
        assert session is not None
        found, best = session.plan, session.plan.recommended
        assert found.search.fastest != found.search.pareto
        right = " ".join(f"{text_of(pilot, '#prediction')} {text_of(pilot, '#reasons')}".split())
        for line in (
            *fusion_lines(best.fusion_savings),
            *front_lines(found.search.pareto),
            *scheduling_lines(found.scheduling),
        ):
            assert line.strip() in right


async def test_escape_stops_a_search_and_keeps_the_best_so_far(tmp_path: Path) -> None:
    async with planner_at(tmp_path, effort=ENDLESS) as pilot:
        await until(pilot, lambda: "best so far" in text_of(pilot, "#headline"))
        await pilot.press("escape")
        await until(pilot, lambda: "Stopped" in text_of(pilot, "#headline"))
        session = app_of(pilot).session
        assert session is not None
        assert session.plan.recommended.fits


async def test_a_search_whose_process_dies_becomes_a_notice(tmp_path: Path) -> None:
    async with planner_at(tmp_path, effort=ENDLESS) as pilot:
        await until(pilot, lambda: "best so far" in text_of(pilot, "#headline"))
        pid = worker("search").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(pilot, lambda: "its process was ended by SIGKILL" in shown(pilot))
        await until(pilot, lambda: "Ctrl+R searches again" in text_of(pilot, "#headline"))
        app_of(pilot).search_effort = dict(FEW_TRIALS)
        await pilot.press("ctrl+r")
        await planned(pilot)


async def test_resize_and_paste_storm(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        for turn in range(12):
            await pilot.resize_terminal(60 + 9 * turn, 18 + 3 * turn)
            pilot.app.screen.query_one("#field-workload Input", Input).insert_text_at_cursor(
                "paste\n\t[bold]" * 20
            )
        await until(pilot, lambda: bool(problem_at(pilot, "workload")))
        await fill(pilot, "workload", "chat")
        await planned(pilot)


def _gpu(pilot: Any) -> str:
    session = app_of(pilot).session
    return session.problem.gpu.name if session else ""


def _says(pilot: Any, name: str, words: str) -> bool:
    return words in problem_at(pilot, name)
