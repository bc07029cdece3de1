"""What is shipped, read once: the lists to choose from and the files behind them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One profile."""

    kind: str
    name: str
    summary: str
    path: Path = Path()

    @classmethod
    def choice(cls, name: str, summary: str) -> Entry:
        """Return an entry of a list that no file stands behind."""
        return cls(kind="choice", name=name, summary=summary)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGpus:
    """The GPUs of this machine."""

    profile: str = ""
    """Empty where there is none, or none that is known."""
    count: int = 0
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Every shipped profile, and what this machine has."""

    entries: tuple[Entry, ...] = ()
    local: LocalGpus = LocalGpus()

    @property
    def gpu_choices(self) -> tuple[Entry, ...]:
        """What can be planned for: the GPUs of this machine first."""
        return (Entry.choice("auto", self.local.words), *self.of("gpu"))

    def of(self, kind: str) -> tuple[Entry, ...]:
        """Return the profiles of one kind."""
        return tuple(entry for entry in self.entries if entry.kind == kind)


KINDS = ("gpu", "model", "workload", "engine", "calibration")


def read_catalogue() -> Catalogue:
    """Read every shipped profile. It reads files: call it from a worker."""
    profiles = (*_gpus(), *_models(), *_workloads(), *_engines(), *_calibrations())
    return Catalogue(entries=profiles, local=_local_gpus())


def profile_text(path: Path, *, limit: int = 20_000) -> str:
    """Return the beginning of a profile's file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= limit else f"{text[:limit]}\n… {len(text):,} characters in all"


def _root() -> Path:
    return Path(str(files("profiles")))


def _local_gpus() -> LocalGpus:
    from cost_models.errors import ProfileError  # noqa: PLC0415  first paint
    from executor.machine import NvmlReader  # noqa: PLC0415

    found = NvmlReader().identity()
    if not found:
        return LocalGpus(words="✗ NVML finds no NVIDIA GPU on this machine")
    if not found.get("gpu_name") or not found.get("gpu_memory_bytes"):
        return LocalGpus(words="✗ NVML does not tell name and memory of this machine's GPU")
    from planner.local_gpu import profile_of_device  # noqa: PLC0415  imports the search

    name, count = str(found["gpu_name"]), int(found["num_gpus_seen"])
    try:
        profile = profile_of_device(name, float(found["gpu_memory_bytes"]))
    except ProfileError as error:
        return LocalGpus(words=f"✗ {error}")
    return LocalGpus(profile=profile, count=count, words=f"this machine: {count} × {name}")


def _gpus() -> list[Entry]:
    from cost_models.calibration_io import calibrated_gpus  # noqa: PLC0415  first paint
    from cost_models.profile_io import list_gpus, load_gpu  # noqa: PLC0415
    from cost_models.units import GIB  # noqa: PLC0415

    fitted, entries = calibrated_gpus(), []
    for name in list_gpus():
        gpu = load_gpu(name)
        source = "calibrated" if name in fitted else "datasheet"
        summary = (
            f"{gpu.memory_bytes / GIB:.0f} GiB  {gpu.hbm_bytes_per_s / 1e12:.2f} TB/s  "
            f"{gpu.usd_per_hour:.2f} USD/h  {source}"
        )
        path = _root() / "gpus" / f"{name}.yaml"
        entries.append(Entry(kind="gpu", name=name, summary=summary, path=path))
    return entries


def _models() -> list[Entry]:
    from cost_models.profile_io import list_models, load_model  # noqa: PLC0415

    entries = []
    for name in list_models():
        model = load_model(name)
        experts = ", experts" if model.is_moe else ""
        summary = f"{model.num_layers} layers, {model.checkpoint_quantization}{experts}"
        path = _root() / "models" / f"{name}.json"
        entries.append(Entry(kind="model", name=name, summary=summary, path=path))
    return entries


def _workloads() -> list[Entry]:
    from planner.workloads.workload import list_workloads, load_workload  # noqa: PLC0415

    entries = []
    for name in list_workloads():
        work = load_workload(name)
        load = work.load()
        summary = f"{work.title}: {load.isl.mean:.0f} in, {load.osl.mean:.0f} out, {work.objective}"
        path = _root() / "workloads" / f"{name}.json"
        entries.append(Entry(kind="workload", name=name, summary=summary, path=path))
    return entries


def _engines() -> list[Entry]:
    paths = sorted((_root() / "engines").glob("*.yaml"))
    return [Entry(kind="engine", name=p.stem, summary="rules", path=p) for p in paths]


def _calibrations() -> list[Entry]:
    root = _root() / "calibrations"
    return [
        Entry(
            kind="calibration",
            name=f"{path.parent.name}/{path.stem}",
            summary=f"{path.stat().st_size / 1024:.0f} KiB",
            path=path,
        )
        for path in sorted(root.glob("*/*.json"))
    ]
