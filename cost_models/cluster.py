"""Where a deployment runs: GPUs of one kind, by node."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.gpu import GpuSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs of one kind that a deployment may take."""

    gpu: GpuSpec
    num_gpus: int = 1
    """GPUs at hand; a deployment may take fewer."""
    gpus_per_node: int = 8
    """GPUs of a host: those that NVLink or PCIe joins."""

    @property
    def num_nodes(self) -> int:
        """Hosts of these GPUs."""
        return -(-self.num_gpus // self.gpus_per_node)
