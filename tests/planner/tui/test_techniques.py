"""What the interface hands to `ladder` and `diagnose`, and what it makes of a failed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import api
from planner.ladder import ladder as use_case
from planner.ladder.bench import Bench
from planner.ladder.rungs import RUNGS
from planner.text.lines import diagnosis_lines
from planner.tui import jobs
from planner.tui.calibrating import run_and_store
from planner.tui.question import Question
from planner.tui.records import record_of_skipped
from tests.planner.tui.driving import planned, planner_at, sees
from tests.planner.tui.stand_in_work import answer_everything

MEASURED = Path(__file__).parents[3] / "profiles" / "runs" / "h200_vllm" / "runs.jsonl"

FEW = str(Path(__file__).parents[2] / "data" / "few.json")
"""A workload of a few requests."""


class Heard:
    """A link that keeps what is reported."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def report(self, message: Any) -> None:
        self.messages.append(message)

    def is_stopped(self) -> bool:
        return False


def test_diagnosis_is_that_of_the_command() -> None:
    run_id = json.loads(MEASURED.read_text().splitlines()[0])["run_id"]
    question = Question(slo="ttft_ms.p99=1", max_quality_loss="0.1")
    said = jobs.diagnose(Heard(), str(MEASURED), run_id, question)
    (expected,) = [
        found
        for found in api.diagnose(
            f"{MEASURED}:{run_id}", slo={"ttft_ms.p99": 1.0}, max_quality_loss_pct=0.1
        )
        if found.run_id == run_id
    ]
    assert said == list(diagnosis_lines(expected))
    assert any("ttft_ms.p99" in line for line in said)


@pytest.mark.parametrize(
    ("source", "run_id", "expected"),
    [
        ("a/runs.jsonl", "x-1", ("a/runs.jsonl:x-1", "")),
        ("a/runs.jsonl", "line 3", ("a/runs.jsonl:3", "")),
        ("planner-runs.db", "x-1", ("x-1", "planner-runs.db")),
        ("postgresql://host/runs", "x-1", ("x-1", "postgresql://host/runs")),
    ],
)
def test_a_run_is_named_as_the_command_takes_it(
    source: str, run_id: str, expected: tuple[str, str]
) -> None:
    assert run_and_store(source, run_id) == expected


def test_ladder_takes_load_and_limit_of_the_form_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> bool:
        raise AssertionError("it asks whether it could measure")

    monkeypatch.setattr(Bench, "can_run", refuse)
    monkeypatch.setattr(use_case, "RUNGS", RUNGS[1:3])
    heard = Heard()
    question = Question(workload=FEW, model="tinyllama-1.1b", max_quality_loss="0.1")
    found = jobs.predict_ladder(heard, question, "")
    assert (found.model, found.gpu) == ("tinyllama-1.1b", "h100_sxm")
    assert [step.over_limit for step in found.steps] == [False, True]
    assert found.best is found.steps[0]
    assert len(heard.messages) == len(found.steps)


def test_a_run_that_was_skipped_says_why() -> None:
    record = record_of_skipped("a-1", "failed: out of memory")
    assert record.is_run
    assert record.lines == (("not predicted", "failed: out of memory"),)


@pytest.mark.asyncio
async def test_palette_has_the_ladder_on_both_screens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_everything(monkeypatch)
    async with planner_at(tmp_path) as pilot:
        await planned(pilot)
        for key in ("f2", "f3"):
            await pilot.press(key)
            await pilot.pause()
            screen = pilot.app.screen
            titles = {command.title for command in pilot.app.get_system_commands(screen)}
            assert {"Ladder", "Export"} <= titles
        await pilot.press("ctrl+l")
        await sees(pilot, "ServerLease on: BF16", "planner quantize")
