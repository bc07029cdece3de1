"""The GPU of this machine, and the profile that describes it."""

from __future__ import annotations

from pathlib import Path

from cost_models.errors import ProfileError
from cost_models.profile_io import load_gpu
from executor.machine import NvmlReader


def _detected_gpu() -> str:
    """Return the profile name of the local GPU, through NVML.

    Raises:
        ProfileError: No NVIDIA driver, no GPU, or a GPU without a profile.
    """
    import pynvml  # noqa: PLC0415  only for --gpu auto

    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total
    except pynvml.NVMLError as error:
        raise ProfileError(f"--gpu auto: no GPU found ({error})", hint="name one") from None
    return profile_of_device(str(name), float(memory))


CARDS = frozenset({"PCIE", "NVL"})
"""Form factors that a product's name tells; without one it is the SXM module."""


def profile_of_device(device_name: str, memory_bytes: float) -> str:
    """Return the profile whose product name shares most with NVML's, nearest in memory.

    Raises:
        ProfileError: No profile is near.
    """
    from cost_models.profile_io import list_gpus  # noqa: PLC0415

    words = _product_words(device_name)
    specs = [load_gpu(name) for name in list_gpus()]
    near = [
        spec
        for spec in specs
        if words & _product_words(spec.title) and abs(spec.memory_bytes / memory_bytes - 1) < 0.1
    ]
    if not near:
        raise ProfileError(
            f"--gpu auto: no profile for {device_name!r}", hint="write a GPU profile"
        )
    return min(
        near,
        key=lambda spec: (
            len((words ^ _product_words(spec.title)) & CARDS),
            abs(spec.memory_bytes - memory_bytes),
        ),
    ).name


def _product_words(name: str) -> set[str]:
    return set(name.upper().replace("-", " ").split()) - {"NVIDIA", "GEFORCE", "SXM"}


CPU = "cpu"
"""The `gpu` of runs without one."""


def profile_name(asked: str) -> str:
    """Return the name of a GPU's profile, or `cpu`."""
    return asked if asked == CPU else load_gpu(asked).name


def _gpu_name(asked: str) -> str:
    """Return how runs name a GPU: a shipped one by its profile, one's own by its file."""
    return asked if Path(asked).suffix else profile_name(asked)


def local_gpu() -> str:
    """Return the profile of this machine's GPU, or `cpu` where there is none.

    Raises:
        ProfileError: A GPU without a profile, or of which NVML tells too little.
    """
    from planner.local_gpu import profile_of_device  # noqa: PLC0415

    identity = NvmlReader().identity()
    if not identity:
        return CPU
    name, memory_bytes = identity.get("gpu_name"), identity.get("gpu_memory_bytes")
    if not name or not memory_bytes:
        raise ProfileError(
            "NVML does not tell name and memory of this machine's GPU",
            hint="name its profile with --gpu, as in --gpu h100",
        )
    return profile_of_device(name, float(memory_bytes))
