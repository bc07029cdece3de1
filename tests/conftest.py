"""Shared fixtures: where optional material lies, and one small problem of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cost_models.calibration import Calibration
from cost_models.calibration_io import load_calibration
from cost_models.gpu import GpuSpec
from cost_models.profile_io import load_gpu


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_users_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Calibrations of whoever runs the tests must not change what they expect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


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
