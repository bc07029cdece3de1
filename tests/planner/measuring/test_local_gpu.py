"""The GPU of this machine, where NVML tells less of it than it should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import pytest

from cost_models.errors import ProfileError
from executor.machine import NvmlReader
from planner.cli.measure import doctor_command
from planner.local_gpu import local_gpu
from planner.tui.catalogue import read_catalogue

H100 = {
    "gpu_name": "NVIDIA H100 80GB HBM3",
    "num_gpus_seen": 2,
    "driver_version": "580.159.04",
    "gpu_memory_bytes": 85520809984,
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What NVML tells; a test takes from it."""
    facts = dict(H100)

    def identity(_: NvmlReader) -> Mapping[str, Any]:
        return facts

    monkeypatch.setattr(NvmlReader, "identity", identity)
    return facts


def doctor(capsys: pytest.CaptureFixture[str]) -> str:
    command: click.Command = doctor_command
    command.main([], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.usefixtures("told")
def test_a_gpu_that_nvml_names_is_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert local_gpu() == "h100_sxm"
    assert "GPU    NVIDIA H100 80GB HBM3 x 2, 580.159.04" in doctor(capsys)
    assert read_catalogue().local.profile == "h100_sxm"


@pytest.mark.parametrize("missing", ["gpu_name", "gpu_memory_bytes"])
def test_a_gpu_of_which_nvml_tells_too_little_must_be_named(
    told: dict[str, Any], missing: str
) -> None:
    del told[missing]
    with pytest.raises(ProfileError, match=r"does not tell name and memory.*--gpu h100"):
        local_gpu()
    assert "does not tell name and memory" in read_catalogue().local.words


def test_the_doctor_says_what_is_unknown(
    told: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del told["gpu_name"], told["driver_version"]
    assert "GPU    of unknown name x 2, unknown driver" in doctor(capsys)
