"""What serves a model: servers of like engines in pools, on a cluster, behind a router.

A server is one process: a front end before the scheduler instances of one replica of the model.
Closed form, simulator, search, written files, executor and measured runs all read these objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from cost_models.cluster import Cluster
from cost_models.engine import KNOBS, EngineConfig
from cost_models.gpu import GpuSpec

ROUTERS = ("round_robin", "least_outstanding", "prefix_aware")
"""How requests are spread over the servers of a pool."""

DEPLOYMENT_KNOBS = ("num_servers", "router")
"""Knobs of the deployment, beside those of each server's engine (`cost_models.engine.KNOBS`)."""

_SPLIT = KNOBS.index("moe_backend") + 1

ALL_KNOBS = (*KNOBS[:_SPLIT], *DEPLOYMENT_KNOBS, *KNOBS[_SPLIT:])
"""Every knob that `--set`, `--pin` and `--limit` take: those of the deployment behind those that
split the model."""


class Role(StrEnum):
    """What the servers of a pool do with a request."""

    BOTH = "both"
    """They compute its prompt and generate its output."""
    PREFILL = "prefill"
    """They compute its prompt, and hand the KV cache over."""
    DECODE = "decode"
    """They generate its output from a KV cache that is handed to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Like servers with one role."""

    config: EngineConfig
    """What the engine of each server is told."""
    gpu: GpuSpec
    """What each server runs on."""
    num_servers: int = 1
    role: Role = Role.BOTH

    @property
    def num_gpus(self) -> int:
        """GPUs of all servers."""
        return self.config.num_gpus * self.num_servers


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Pools of servers on a cluster, behind a router."""

    cluster: Cluster
    pools: tuple[Pool, ...]
    router: str = ROUTERS[0]

    @classmethod
    def of(cls, config: EngineConfig, cluster: Cluster, *, num_servers: int = 1) -> Deployment:
        """Return the deployment of one pool whose servers do everything."""
        pool = Pool(config=config, gpu=cluster.gpu, num_servers=num_servers)
        return cls(cluster=cluster, pools=(pool,))

    @property
    def pool(self) -> Pool:
        """The only pool.

        Raises:
            ValueError: There are several: prefill and decode have servers of their own.
        """
        (pool,) = self.pools
        return pool

    @property
    def config(self) -> EngineConfig:
        """What the engine of each server of the only pool is told."""
        return self.pool.config

    @property
    def num_servers(self) -> int:
        """Servers of all pools."""
        return sum(pool.num_servers for pool in self.pools)

    @property
    def num_gpus(self) -> int:
        """GPUs of all pools."""
        return sum(pool.num_gpus for pool in self.pools)

    def knob(self, name: str) -> Any:
        """Return the value of a knob of the deployment, or of the engine of its only pool."""
        return getattr(self if name in DEPLOYMENT_KNOBS else self.config, name)

    def with_knobs(self, **knobs: Any) -> Deployment:
        """Return the deployment with knobs changed: its own, and those of its only pool."""
        pool = self.pool
        engine = {name: value for name, value in knobs.items() if name not in DEPLOYMENT_KNOBS}
        changed = replace(
            pool,
            config=replace(pool.config, **engine) if engine else pool.config,
            num_servers=knobs.get("num_servers", pool.num_servers),
        )
        return replace(self, pools=(changed,), router=knobs.get("router", self.router))

    def with_config(self, config: EngineConfig) -> Deployment:
        """Return the deployment with another engine configuration in its only pool."""
        return replace(self, pools=(replace(self.pool, config=config),))
