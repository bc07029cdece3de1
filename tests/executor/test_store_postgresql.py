"""The store on a PostgreSQL server of its own, where one can be started."""

from __future__ import annotations

from executor.store import RunStore
from tests.executor.test_store import REQUESTS, record


def test_runs_are_kept_in_postgresql(postgresql: str) -> None:
    store = RunStore(postgresql)
    store.save(record("a-1"), REQUESTS, key="a")
    store.save(record("a-2", "crashed"), (), key="a")
    store.close()
    again = RunStore(postgresql)
    assert [run.run_id for run in again.runs()] == ["a-1", "a-2"]
    assert [run.run_id for run in again.finished("a")] == ["a-1"]
    assert len(again.run("a-1").requests()) == 3
    assert again.count("a") == 2
    again.close()
