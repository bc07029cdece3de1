"""The strict form of a GPU profile file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cost_models.gpu import GpuSpec

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, le=1e18)]


class GpuProfile(BaseModel):
    """One GPU; every number has an entry in `source`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_version: Literal[1]
    name: str
    title: str
    aliases: list[str] = []
    architecture: Literal["ampere", "ada", "hopper", "blackwell"]
    compute_capability: Annotated[list[int], Field(min_length=2, max_length=2)]
    memory_bytes: Positive
    hbm_bytes_per_s: Positive
    l2_bytes: Positive
    num_sms: Annotated[int, Field(gt=0, le=10_000)]
    flop_per_s: dict[Literal["bf16", "fp8", "int8", "fp4"], Positive]
    link_bytes_per_s: Positive
    has_nvlink: bool
    tdp_w: Positive
    usd_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: dict[str, str]

    def spec(self) -> GpuSpec:
        """Return the profile as the core reads it."""
        values = self.model_dump(exclude={"schema_version", "aliases", "source"})
        major, minor = self.compute_capability
        return GpuSpec(**{**values, "compute_capability": (major, minor)})
