"""Machine facts: what telemetry says of throttled and shared GPUs; nothing without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from executor.machine import (
    GpuSample,
    NvmlReader,
    Telemetry,
    git_revision,
    installed_versions,
    is_shared,
    machine_section,
    memory_used_bytes,
    over_time,
    telemetry_section,
    visible_gpus,
    wait_until_free,
)

GIB = float(1 << 30)


@dataclass
class ScriptedGpu:
    """A GPU whose memory follows a script; it stays at the last value."""

    used_bytes: list[float]
    throttle_bits: int = 0

    def identity(self) -> Mapping[str, Any]:
        return {"gpu_name": "NVIDIA TEST", "num_gpus_seen": 1}

    def sample(self) -> Sequence[GpuSample]:
        used = self.used_bytes.pop(0) if len(self.used_bytes) > 1 else self.used_bytes[0]
        return [
            GpuSample(
                power_w=300.0,
                sm_clock_hz=1.98e9,
                memory_used_bytes=used,
                throttle_bits=self.throttle_bits,
            )
        ]


def test_telemetry_has_a_first_and_a_last_sample() -> None:
    gpu = ScriptedGpu(used_bytes=[1 * GIB, 70 * GIB])
    with Telemetry(gpu, interval_s=3600.0) as telemetry:
        pass
    summary = telemetry.summary()
    assert summary["num_samples"] == 2
    assert summary["memory_used_bytes"]["max"] == 70 * GIB
    assert summary["sm_clock_mhz"] == {"mean": 1980.0, "min": 1980.0, "max": 1980.0}
    assert summary["throttled"] is False
    assert summary["over_time"]["memory_used_bytes"] == [1 * GIB, 70 * GIB]
    assert "temperature_c" not in summary


def test_memory_is_kept_over_time_in_few_points() -> None:
    looks = [
        (0.25 * number, [GpuSample(memory_used_bytes=number * GIB), GpuSample(power_w=300.0)])
        for number in range(1000)
    ]
    section = over_time(looks)
    assert len(section["at_s"]) == 32
    assert section["at_s"][-1] == 0.25 * 999
    # The greatest of each stretch, so that no peak is lost.
    assert section["memory_used_bytes"][-1] == 999 * GIB
    assert section["memory_used_bytes"] == sorted(v or 0.0 for v in section["memory_used_bytes"])
    assert section["power_w"] == [300.0] * 32
    assert "temperature_c" not in section
    assert over_time(looks[:2])["at_s"] == [0.0, 0.25]


def test_a_gpu_that_lowers_its_clocks_is_flagged() -> None:
    hot = [GpuSample(throttle_bits=0x40)] * 2 + [GpuSample()] * 8
    assert telemetry_section(hot)["throttle_fraction"] == {"hw_thermal_slowdown": 0.2}
    assert telemetry_section(hot)["throttled"] is True
    capped = telemetry_section([GpuSample(throttle_bits=0x4)])
    assert (capped["power_capped"], capped["throttled"]) == (True, False)
    # An idle GPU (0x1) has low clocks for want of work.
    assert telemetry_section([GpuSample(throttle_bits=0x1)])["throttled"] is False


def test_memory_must_come_back() -> None:
    freed = ScriptedGpu(used_bytes=[60 * GIB, 30 * GIB, 0.2 * GIB])
    assert wait_until_free(freed, [0.1 * GIB], limit_s=30.0)
    held = ScriptedGpu(used_bytes=[60 * GIB])
    assert not wait_until_free(held, [0.1 * GIB], limit_s=0.0)


@pytest.mark.parametrize(("used", "shared"), [(0.4 * GIB, False), (20 * GIB, True)])
def test_a_gpu_that_others_use_is_shared(used: float, shared: bool) -> None:
    assert is_shared(memory_used_bytes(ScriptedGpu(used_bytes=[used]))) is shared


@pytest.mark.parametrize(
    ("named", "indices"),
    [(None, [0, 1, 2, 3]), ("2,0", [2, 0]), ("", []), ("3,7", [3]), ("GPU-1a", [0, 1, 2, 3])],
)
def test_only_gpus_that_cuda_may_use_are_read(
    monkeypatch: pytest.MonkeyPatch, named: str | None, indices: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus(4) == indices


def test_without_a_gpu_there_is_no_telemetry() -> None:
    reader = NvmlReader(0)
    with Telemetry(reader) as telemetry:
        pass
    assert telemetry.summary() == {}
    assert wait_until_free(reader, [], limit_s=0.0)


def test_a_run_knows_its_machine() -> None:
    section = machine_section(
        ScriptedGpu(used_bytes=[0.0]), versions={"vllm": "0.25.1"}, command="vllm serve m"
    )
    assert section["gpu_name"] == "NVIDIA TEST"
    assert section["versions"] == {"vllm": "0.25.1"}
    assert section["command"] == "vllm serve m"
    assert section["num_cpus"] >= 1


def test_versions_and_revision() -> None:
    assert set(installed_versions(("numpy", "no-such-package"))) == {"numpy"}
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(git_revision().rstrip("+")) == 40
