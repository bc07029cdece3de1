"""The store: what is stored is there, also when the database cannot take it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cost_models.errors import ConfigError, MeasurementError
from executor.records import MeasuredRequest, RunRecord
from executor.store import RunStore, resume_key

REQUESTS = tuple(
    MeasuredRequest(arrival_s=0.1 * n, isl=10, osl=2, chunk_s=(0.1, 0.2), chunk_tokens=(1, 1))
    for n in range(3)
)


def record(run_id: str, status: str = "ok") -> RunRecord:
    return RunRecord(
        run_id=run_id,
        source="test",
        gpu="h200_sxm",
        engine="vllm",
        model="Qwen/Qwen3-8B",
        config={"max_batch_size": 8},
        workload={"protocol": "offline", "isl": 10, "osl": 2},
        measured={"output_tok_per_s": 5.0},
        status=status,
    )


def test_a_run_is_stored_with_every_request(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    RunStore(url).save(record("r-1"), REQUESTS, key="k")
    found = RunStore(url).run("r-1")
    assert found.record == record("r-1").to_json()
    assert [line["arrival_s"] for line in found.requests()] == [0.0, 0.1, 0.2]
    assert (found.key, found.status) == ("k", "ok")


def test_a_campaign_finds_its_own_good_runs(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "runs.db"))
    for run_id, status, key in (("a-1", "ok", "a"), ("a-2", "crashed", "a"), ("b-1", "ok", "b")):
        store.save(record(run_id, status), REQUESTS, key=key)
    assert [run.run_id for run in store.finished("a")] == ["a-1"]
    assert [run.run_id for run in store.runs()] == ["a-1", "a-2", "b-1"]
    assert (store.count("a"), store.count("c")) == (2, 0)


def test_hosts_that_end_the_same_run_in_one_moment_both_keep_theirs(tmp_path: Path) -> None:
    one, other = (RunStore(str(tmp_path / "runs.db")) for _ in range(2))
    assert one.save(record("a-1"), REQUESTS, key="k").run_id == "a-1"
    assert other.save(record("a-1"), (), key="k").run_id == "a-2"
    stored = one.runs()
    assert [run.run_id for run in stored] == ["a-1", "a-2"]
    assert [run.record["run_id"] for run in stored] == ["a-1", "a-2"]
    assert not one.spill_path.exists()


def test_a_spilled_run_whose_id_was_taken_meanwhile_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = RunStore(str(path), lock_wait_s=0.1)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(MeasurementError, match=r"locked"):
        store.save(record("a-1"), REQUESTS, key="k")
    other.rollback()
    other.close()
    store.save(record("a-1"), (), key="k")
    spilled = store.spill_path.read_text()
    for _ in range(2):  # the second time as after a death between taking in and unlinking
        store.spill_path.write_text(spilled)
        stored = {run.run_id: run for run in RunStore(str(path)).runs()}
        assert sorted(stored) == ["a-1", "a-2"]
        assert len(stored["a-2"].requests()) == len(REQUESTS)
        assert stored["a-2"].record["run_id"] == "a-2"


def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "runs.db"))
    for run_id in ("h200_a-1", "h200_a-12", "h200_b-1"):
        store.save(record(run_id), (), key="k")
    assert store.run("h200_b").run_id == "h200_b-1"
    assert store.run("h200_a-1").run_id == "h200_a-1"
    for wrong in ("h200", "h100", "h200%"):
        with pytest.raises(ConfigError, match=r"runs are called"):
            store.run(wrong)


def test_a_locked_database_spills_and_is_taken_in_later(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = RunStore(str(path), lock_wait_s=0.1)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(MeasurementError, match=r"locked.*run r-1 is in .*another --store"):
        store.save(record("r-1"), REQUESTS, key="k")
    other.rollback()
    other.close()
    assert store.spill_path.is_file()
    again = RunStore(str(path))
    assert len(again.run("r-1").requests()) == 3
    assert not store.spill_path.exists()


def test_a_full_disk_spills_and_says_so(tmp_path: Path) -> None:
    """The size of files is limited to that of the database, as a quota would."""
    program = (
        "import os, pathlib, resource, sys\n"
        "from tests.executor.test_store import REQUESTS, record\n"
        "from executor.store import RunStore\n"
        "from cost_models.errors import MeasurementError\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "store = RunStore(str(path))\n"
        "size = path.stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try:\n"
        "    for n in range(1000): store.save(record(f'r-{n}'), REQUESTS, key='k')\n"
        "except MeasurementError as error: print(n, error)\n"
    )
    path = tmp_path / "runs.db"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    number, _, message = result.stdout.partition(" ")
    assert "free disk space" in message
    assert f"run r-{number} is in" in message
    assert len(message.strip().splitlines()) == 1
    assert [run.run_id for run in RunStore(str(path)).runs()] == [
        f"r-{n}" for n in range(int(number) + 1)
    ]


def test_a_spilled_line_that_was_cut_off_is_left(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "runs.db"))
    store.spill_path.write_text('{"run_id": "r-1", "requ')
    assert RunStore(str(tmp_path / "runs.db")).runs() == []


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    RunStore(str(path)).close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE planner_meta SET schema_version = 7")
    database.close()
    with pytest.raises(ConfigError, match="schema version 7"):
        RunStore(str(path))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense://x", "nonsense"),
        ("sqlite:////nonexistent/folder/runs.db", "its folder exists"),
        ("postgresql://nobody@127.0.0.1:1/x", "postgresql"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_line(url: str, words: str) -> None:
    with pytest.raises((ConfigError, MeasurementError), match=words) as caught:
        RunStore(url)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, not a database\n" * 100)
    with pytest.raises(MeasurementError, match="not a database"):
        RunStore(str(path))


def test_keys_depend_on_content_alone() -> None:
    assert resume_key({"a": 1, "b": 2}) == resume_key({"b": 2, "a": 1})
    assert resume_key({"a": 1}) != resume_key({"a": 2})
