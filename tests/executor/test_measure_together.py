"""Several cases behind one start of a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from executor.backend import Launch
from executor.case import Case
from executor.measure import measure, measure_together
from executor.store import RunStore
from tests.executor.test_backends import marked_processes
from tests.executor.test_measure import OPTIONS, TRAFFIC, WARM_UP_REQUESTS, tools

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "runs.db"))


@pytest.fixture
def cases(deployment: Launch) -> list[Case]:
    longer = replace(TRAFFIC, osl=[12] * 8, workload={**TRAFFIC.workload, "osl": 12})
    return [
        Case(deployment=deployment, traffic=traffic, gpu="h200_sxm")
        for traffic in (TRAFFIC, longer)
    ]


def test_they_share_a_start_and_are_stored_apart(cases: list[Case], store: RunStore) -> None:
    said: list[str] = []
    first, second = measure_together(
        cases, tools(store, progress=lambda what, _left_s: said.append(what))
    )
    assert first.is_ok
    assert second.is_ok
    assert first.key != second.key
    assert [record["workload"]["osl"] for record in (*first.records, *second.records)] == [
        6, 6, 12, 12,
    ]  # fmt: skip
    assert said == [
        "prepare", "start", "case 1, warm up", "case 1, run 1", "case 1, run 2",
        "case 2, warm up", "case 2, run 1", "case 2, run 2", "stop",
    ]  # fmt: skip
    # A case keeps its key: measured alone, it is complete already.
    assert measure(cases[1], tools(store)).num_resumed == 2
    assert marked_processes() == set()


def test_what_is_complete_is_not_measured_again(cases: list[Case], store: RunStore) -> None:
    measure(cases[0], tools(store))
    said: list[str] = []
    first, second = measure_together(
        cases, tools(store, progress=lambda what, _left_s: said.append(what))
    )
    assert (first.num_resumed, second.num_resumed) == (2, 0)
    assert not any(what.startswith("case 1") for what in said)
    assert len(store.runs()) == 4


def test_a_server_that_dies_fails_what_was_still_to_come(
    cases: list[Case], store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILURE", "dies")
    monkeypatch.setenv("STAND_IN_FAILS_AFTER", str(WARM_UP_REQUESTS + 3))
    results = measure_together(cases, tools(store))
    assert [[r["status"] for r in result.records] for result in results] == [["crashed"]] * 2
    assert all(result.records[0]["error"] for result in results)
    assert marked_processes() == set()
    monkeypatch.delenv("STAND_IN_FAILURE")
    monkeypatch.delenv("STAND_IN_FAILS_AFTER")
    again = measure_together(cases, tools(store))
    assert [len(result.measured) for result in again] == [2, 2]


def test_the_budget_is_theirs_together(cases: list[Case], store: RunStore) -> None:
    patient = replace(OPTIONS.rule, least=10_000, most=10_000)
    options = replace(OPTIONS, rule=patient, time_budget_s=8.0)
    results = measure_together(cases, tools(store, options=options))
    counts = [len(result.measured) for result in results]
    assert min(counts) >= 1
    assert max(counts) < 10_000
