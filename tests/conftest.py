"""Shared fixtures: where optional material lies, and one small problem of each kind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cost_models.calibration import Calibration
from cost_models.gpu import GpuSpec
from cost_models.profile_io import load_gpu
from engines.registry import load_calibration
from executor.process import free_port

# How long an example takes says more of what else runs here than of the code.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_users_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Calibrations of whoever runs the tests must not change what they expect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _interrupts_reach_what_is_started() -> None:
    """A shell has SIGINT ignored in what it runs in the background, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of measured data beside the checkout; tests that need it skip without."""
    if not SHARED.is_dir():
        pytest.skip("no shared material beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def h100() -> GpuSpec:
    return load_gpu("h100")


@pytest.fixture(scope="session")
def h100_calibration(h100: GpuSpec) -> Calibration:
    return load_calibration(h100)


@pytest.fixture
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server of its own; tests that need one skip where none can start."""
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
