"""What survives a restart, and what is ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.widgets import Input

from planner.tui.question import Question
from planner.tui.state import State, load_state, save_state
from tests.planner.tui.driving import app_of, fill, planned, planner_at, shown, until


@given(texts=st.lists(st.text(), min_size=12, max_size=12))
def test_state_is_read_as_it_was_written(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = list(Question.__dataclass_fields__)
    question = Question(**dict(zip(names, texts, strict=False)))
    state = State(question=question, screen=texts[9], theme=texts[10], runs_file=texts[11])
    path = tmp_path_factory.mktemp("state") / "tui.json"
    assert save_state(path, state) == ""
    assert load_state(path) == (state, "")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema_version": 99}', '{"schema_version": 1}', "\x00"]
)
def test_broken_state_is_ignored_with_a_notice(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tui.json"
    path.write_text(text)
    state, notice = load_state(path)
    assert state == State()
    assert f"{path} is ignored" in notice


def test_state_of_an_earlier_version_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "tui.json"
    save_state(path, State(question=Question(gpu="h200_sxm")))
    data = json.loads(path.read_text())
    del data["question"]["max_quality_loss"]
    path.write_text(json.dumps(data))
    assert load_state(path) == (State(question=Question(gpu="h200_sxm")), "")


def test_state_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "tui.json"
    folder.mkdir()
    assert "cannot be written" in save_state(folder, State())
    assert folder.is_dir()


@pytest.mark.asyncio
async def test_question_screen_and_theme_survive_a_restart(tmp_path: Path) -> None:
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        await fill(pilot, "rate", "3")
        await until(pilot, lambda: app_of(pilot).state.question.rate == "3")
        await pilot.press("ctrl+t", "f4")
        theme = pilot.app.theme
    async with planner_at(tmp_path) as pilot:
        await until(pilot, lambda: "GPUs" in shown(pilot))
        assert app_of(pilot).current_mode == "profiles"
        assert pilot.app.theme == theme
        await pilot.press("f2")
        assert pilot.app.screen.query_one("#field-rate Input", Input).value == "3"


@pytest.mark.asyncio
async def test_the_form_of_a_measurement_survives_a_restart(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f5")
        await fill(pilot, "requests", "12")
        await until(pilot, lambda: app_of(pilot).state.measuring.get("requests") == "12")
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f5")
        form = {
            name: pilot.app.screen.query_one(f"#field-{name} Input", Input).value
            for name in ("requests", "backend", "repeats")
        }
        assert form == {"requests": "12", "backend": "transformers", "repeats": ""}


@pytest.mark.asyncio
async def test_broken_state_file_becomes_a_notice_on_screen(tmp_path: Path) -> None:
    (tmp_path / "tui.json").write_text("{")
    async with planner_at(tmp_path) as pilot:
        await until(pilot, lambda: "ignored" in shown(pilot))
        await planned(pilot)
