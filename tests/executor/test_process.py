"""Server processes: all of a server ends, also when the measuring process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from executor.backend import Failure, ServerFailedError
from executor.process import ServerProcess, described, free_port, tail
from executor.process_group import members

STUBBORN = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    "print('up', flush=True)\n"
    "time.sleep(600)\n"
)


def wait_for(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen"
        time.sleep(0.02)


def test_stopping_ends_everything_also_what_left_the_group(tmp_path: Path) -> None:
    process = ServerProcess([sys.executable, "-c", STUBBORN], log_path=tmp_path / "log")
    wait_for(lambda: len(process.pids) == 3 and "up" in process.log_text())
    process.stop(polite_s=0.5)
    assert process.pids == []
    assert process.exit_status == 128 + signal.SIGKILL
    process.stop()


def test_a_server_does_not_outlive_the_process_that_measures(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from executor.process import ServerProcess\n"
        "server = ServerProcess(['sleep', '600'], log_path=pathlib.Path(sys.argv[1]) / 'log')\n"
        "print(server.server_id, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as measuring:
        assert measuring.stdout is not None
        server_id = measuring.stdout.readline().strip()
        wait_for(lambda: len(members(server_id)) == 2)
        os.kill(measuring.pid, signal.SIGKILL)
    wait_for(lambda: not members(server_id))


def test_a_program_that_takes_too_long_is_hung(tmp_path: Path) -> None:
    process = ServerProcess(["sleep", "600"], log_path=tmp_path / "log")
    try:
        with pytest.raises(ServerFailedError) as caught:
            process.wait_ended(limit_s=0.1)
    finally:
        process.stop()
    assert caught.value.kind is Failure.HUNG


def test_a_program_that_is_not_there_has_failed_with_its_name(tmp_path: Path) -> None:
    process = ServerProcess(["/nonexistent/engine"], log_path=tmp_path / "log")
    with pytest.raises(ServerFailedError) as caught:
        process.wait_healthy(port=free_port(), limit_s=20)
    process.stop()
    assert caught.value.kind is Failure.CRASHED_AT_START
    assert "/nonexistent/engine" in caught.value.log_tail


@pytest.mark.parametrize(
    ("status", "words"),
    [(None, "still running"), (0, "ended with status 0"), (137, "ended by SIGKILL")],
)
def test_exit_statuses_are_put_into_words(status: int | None, words: str) -> None:
    assert described(status) == words


def test_a_tail_is_short() -> None:
    assert len(tail("line\n" * 100_000).splitlines()) == 40
    assert len(tail("x" * 100_000)) == 4000


def test_a_process_that_sets_its_title_is_still_found(tmp_path: Path) -> None:
    """As vLLM's EngineCore does: the title is written over what /proc shows of the environment."""
    program = (
        "import setproctitle, time\n"
        "setproctitle.setproctitle('VLLM::EngineCore')\n"
        "print('titled', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = ServerProcess([sys.executable, "-c", program], log_path=tmp_path / "log")
    wait_for(lambda: "titled" in process.log_text())
    assert len(process.pids) == 2  # the guard too
    process.stop()
    assert process.pids == []
