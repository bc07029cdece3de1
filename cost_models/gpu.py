"""What a GPU can do, from its datasheet. SI units: bytes, seconds, FLOP/s, watts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOST_LINK_BYTES_PER_S: Mapping[str, float] = {
    "ampere": 25e9,
    "ada": 25e9,
    "hopper": 50e9,
    "blackwell": 50e9,
}
"""What copies from pinned host memory reach over PCIe 4 and 5 with 16 lanes, by architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One GPU, as its datasheet and driver describe it.

    Rates are dense (no structured sparsity). Links are per GPU and direction.
    """

    name: str
    """Profile name, for example `h100_sxm`."""
    title: str
    """Product name, for example `NVIDIA H100 SXM5 80GB`."""
    architecture: str
    """`ampere`, `ada`, `hopper` or `blackwell`."""
    compute_capability: tuple[int, int]
    memory_bytes: float
    """What the driver reports as total memory (less than the marketed size)."""
    hbm_bytes_per_s: float
    l2_bytes: float
    num_sms: int
    flop_per_s: Mapping[str, float]
    """Dense tensor-core rate per compute precision: `bf16`, `fp8`, `int8`, `fp4`.

    A precision without hardware support is absent.
    """
    link_bytes_per_s: float
    """GPU-to-GPU bandwidth (NVLink, or PCIe where there is no NVLink)."""
    has_nvlink: bool
    tdp_w: float
    usd_per_hour: float
    """On-demand price of one GPU for one hour."""

    def __hash__(self) -> int:
        """Return the hash of its name: equal GPUs have equal names."""
        return hash(self.name)

    @property
    def host_link_bytes_per_s(self) -> float:
        """Bandwidth from host memory."""
        return HOST_LINK_BYTES_PER_S[self.architecture]

    @property
    def sm(self) -> int:
        """Compute capability as one number: 90 for Hopper, 89 for Ada."""
        return self.compute_capability[0] * 10 + self.compute_capability[1]

    def peak_flop_per_s(self, compute: str) -> float:
        """Dense rate for a compute precision; falls back to bf16 where it is not native."""
        return self.flop_per_s.get(compute, self.flop_per_s["bf16"])
