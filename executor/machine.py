"""The machine that a run was measured on: GPU, driver, clocks, power, versions, revision."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

THROTTLE_REASONS: Mapping[int, str] = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake",
}
"""Bits of `nvmlDeviceGetCurrentClocksEventReasons` that lower the clocks (nvml.h)."""

POWER_CAP = "sw_power_cap"
"""No fault: under a language model's load a data-centre GPU runs at its power limit."""

THROTTLED_FRACTION = 0.01
"""Share of the samples with a reason to lower clocks above which a run counts as throttled."""

SHARED_BYTES = 1 << 30
"""Memory in use before anything was started above which the GPU counts as shared."""

FREE_SLACK_BYTES = 512 << 20
"""Memory that may stay in use when a server has gone: what a driver keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One look at a GPU; what it does not tell is None."""

    power_w: float | None = None
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_c: float | None = None
    memory_used_bytes: float | None = None
    busy_fraction: float | None = None
    throttle_bits: int = 0


class GpuReader(Protocol):
    """Reads the GPUs of a machine."""

    def identity(self) -> Mapping[str, Any]:
        """Return name, driver, memory and limits; empty where there is no GPU."""

    def sample(self) -> Sequence[GpuSample]:
        """Return one sample a GPU; empty where there is none."""


class NvmlReader:
    """Reads GPUs through NVML: the first of those that CUDA programs of this process may use.

    Args:
        num_gpus: How many; None is all.
    """

    def __init__(self, num_gpus: int | None = None) -> None:
        import pynvml  # noqa: PLC0415  a driver call: only when something is measured

        self._nvml = pynvml
        self._handles: list[Any] = []
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            chosen = visible_gpus(pynvml.nvmlDeviceGetCount())[:num_gpus]
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in chosen]

    def identity(self) -> dict[str, Any]:
        """Return name, driver, memory and limits of the first GPU, and how many there are."""
        if not self._handles:
            return {}
        first, nvml = self._handles[0], self._nvml
        memory = self._ask("nvmlDeviceGetMemoryInfo", first)
        limit_mw = self._ask("nvmlDeviceGetEnforcedPowerLimit", first)
        facts = {
            "gpu_name": _text(self._ask("nvmlDeviceGetName", first)),
            "num_gpus_seen": len(self._handles),
            "driver_version": _text(self._ask("nvmlSystemGetDriverVersion")),
            "gpu_memory_bytes": memory and int(memory.total),
            "power_limit_w": limit_mw and limit_mw / 1e3,
            "max_sm_clock_mhz": self._ask("nvmlDeviceGetMaxClockInfo", first, nvml.NVML_CLOCK_SM),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def sample(self) -> list[GpuSample]:
        """Return one sample a GPU."""
        return [self._sample(handle) for handle in self._handles]

    def _sample(self, handle: Any) -> GpuSample:
        nvml = self._nvml
        power_mw = self._ask("nvmlDeviceGetPowerUsage", handle)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        busy = self._ask("nvmlDeviceGetUtilizationRates", handle)
        sm_mhz = self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM)
        memory_mhz = self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM)
        return GpuSample(
            power_w=_scaled(power_mw, 1e-3),
            sm_clock_hz=_scaled(sm_mhz, 1e6),
            memory_clock_hz=_scaled(memory_mhz, 1e6),
            temperature_c=self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            memory_used_bytes=memory and float(memory.used),
            busy_fraction=busy and busy.gpu / 100,
            throttle_bits=self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0,
        )

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Return an answer of NVML, or None where this GPU or driver has none."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None


def visible_gpus(count: int) -> list[int]:
    """Return the numbers of the GPUs that `CUDA_VISIBLE_DEVICES` leaves, in its order."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(count))
    parts = [part.strip() for part in named.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        # Named by UUID or as a slice: they cannot be told apart here.
        return list(range(count))
    return [int(part) for part in parts if int(part) < count]


Look = tuple[float, Sequence[GpuSample]]
"""A moment, in seconds from the start, and what each GPU read then."""

MOST_POINTS = 32
"""Moments of a run that are kept: enough to see memory grow, little enough for a record."""


class Telemetry:
    """Samples the GPUs in a thread while something runs; a context manager."""

    INTERVAL_S = 0.25

    def __init__(self, reader: GpuReader, *, interval_s: float = INTERVAL_S) -> None:
        self._reader = reader
        self._interval_s = interval_s
        self._looks: list[Look] = []
        self._start_s = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Telemetry:
        """Take the first sample and start the thread."""
        self._look()
        if self._looks:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last sample and end the thread."""
        self._stop.set()
        if self._looks:
            self._thread.join()
            self._look()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        samples = self._reader.sample()
        if samples:
            self._looks.append((time.monotonic() - self._start_s, samples))

    def summary(self) -> dict[str, Any]:
        """Return each reading in short and over time, and the reasons for lowered clocks."""
        if not self._looks:
            return {}
        samples = [sample for _, looked in self._looks for sample in looked]
        return {**telemetry_section(samples), "over_time": over_time(self._looks)}


def over_time(looks: Sequence[Look]) -> dict[str, list[float | None]]:
    """Return some readings at a few moments of a run, each the greatest since the one before.

    Of several GPUs it is the one that reads most. Clocks are in MHz.
    """
    num_points = min(len(looks), MOST_POINTS)
    ends = [len(looks) * (point + 1) // num_points for point in range(num_points)]
    parts = [looks[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    readings: Mapping[str, Callable[[GpuSample], float | None]] = {
        "memory_used_bytes": lambda sample: sample.memory_used_bytes,
        "power_w": lambda sample: sample.power_w,
        "sm_clock_mhz": lambda sample: _scaled(sample.sm_clock_hz, 1e-6),
        "temperature_c": lambda sample: sample.temperature_c,
    }
    section: dict[str, list[float | None]] = {"at_s": [round(part[-1][0], 2) for part in parts]}
    for name, read in readings.items():
        column = [[read(sample) for _, samples in part for sample in samples] for part in parts]
        greatest = [max((v for v in values if v is not None), default=None) for values in column]
        if any(value is not None for value in greatest):
            section[name] = greatest
    return section


def telemetry_section(samples: Sequence[GpuSample]) -> dict[str, Any]:
    """Return the telemetry of one sample or more in short; clocks in MHz."""
    columns = {
        "power_w": [s.power_w for s in samples],
        "sm_clock_mhz": [_scaled(s.sm_clock_hz, 1e-6) for s in samples],
        "memory_clock_mhz": [_scaled(s.memory_clock_hz, 1e-6) for s in samples],
        "temperature_c": [s.temperature_c for s in samples],
        "memory_used_bytes": [s.memory_used_bytes for s in samples],
        "busy_fraction": [s.busy_fraction for s in samples],
    }
    section: dict[str, Any] = {"num_samples": len(samples)}
    for name, column in columns.items():
        values = [value for value in column if value is not None]
        if values:
            section[name] = {
                "mean": round(float(np.mean(values)), 2),
                "min": round(min(values), 2),
                "max": round(max(values), 2),
            }
    reasons = {
        name: round(sum(bool(s.throttle_bits & bit) for s in samples) / len(samples), 4)
        for bit, name in THROTTLE_REASONS.items()
    }
    section["throttle_fraction"] = {name: share for name, share in reasons.items() if share}
    lowered = {name for name, share in reasons.items() if share > THROTTLED_FRACTION}
    section["power_capped"] = POWER_CAP in lowered
    section["throttled"] = bool(lowered - {POWER_CAP})
    return section


def memory_used_bytes(reader: GpuReader) -> list[float]:
    """Return the memory in use on each GPU."""
    return [sample.memory_used_bytes or 0.0 for sample in reader.sample()]


def is_shared(before: Sequence[float]) -> bool:
    """Return whether somebody else held memory of a GPU before the run."""
    return any(used > SHARED_BYTES for used in before)


def wait_until_free(reader: GpuReader, before: Sequence[float], *, limit_s: float) -> bool:
    """Return whether the memory in use came back to what it was before a server ran."""
    until_s = time.monotonic() + limit_s
    while True:
        now = memory_used_bytes(reader)
        if all(a <= b + FREE_SLACK_BYTES for a, b in zip(now, before, strict=False)):
            return True
        if time.monotonic() > until_s:
            return False
        time.sleep(0.2)


def machine_section(
    reader: GpuReader, *, versions: Mapping[str, str], command: str
) -> dict[str, Any]:
    """Return what is known of the machine and of what runs on it."""
    section = {
        **reader.identity(),
        "host_cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": dict(versions),
        "git_revision": git_revision(),
        "command": command,
    }
    return {name: value for name, value in section.items() if value}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_revision() -> str:
    """Return the commit of this checkout, with `+` where it is changed; empty elsewhere."""
    folder = Path(__file__).resolve().parent
    try:
        answers = [
            subprocess.run(  # noqa: S603  fixed arguments
                ["git", *arguments],  # noqa: S607  wherever git is
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return answers[0] + ("+" if answers[1] else "")


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
