"""The store on a PostgreSQL server of its own, where one can be started."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor.process import free_port
from executor.store import RunStore
from tests.executor.test_store import REQUESTS, record


@pytest.fixture
def url() -> Iterator[str]:
    pytest.importorskip("psycopg")
    initdb, pg_ctl = shutil.which("initdb"), shutil.which("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed")
    # The server refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="planner-postgresql-"))
    if user:
        shutil.chown(folder, user)
    data, port = str(folder / "data"), free_port()

    def run(*command: str) -> None:
        subprocess.run(
            command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60
        )

    try:
        run(initdb, "-D", data, "-U", "planner", "--auth=trust", "--no-sync")
        options = f"-p {port} -k {folder} -c fsync=off"
        run(pg_ctl, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://planner@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def test_runs_are_kept_in_postgresql(url: str) -> None:
    store = RunStore(url)
    store.save(record("a-1"), REQUESTS, key="a")
    store.save(record("a-2", "crashed"), (), key="a")
    store.close()
    again = RunStore(url)
    assert [run.run_id for run in again.runs()] == ["a-1", "a-2"]
    assert [run.run_id for run in again.finished("a")] == ["a-1"]
    assert len(again.run("a-1").requests()) == 3
    assert again.count("a") == 2
    again.close()
