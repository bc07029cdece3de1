"""Two Hopper GPUs for the operators' tests, so that they read no profile."""

from __future__ import annotations

from dataclasses import replace

from cost_models.gpu import GpuSpec

H200 = GpuSpec(
    name="h200_sxm",
    title="NVIDIA H200 SXM",
    architecture="hopper",
    compute_capability=(9, 0),
    memory_bytes=143771 * 2**20,
    hbm_bytes_per_s=4.8e12,
    l2_bytes=50e6,
    num_sms=132,
    flop_per_s={"bf16": 989.4e12, "fp8": 1978.9e12},
    link_bytes_per_s=450e9,
    has_nvlink=True,
    tdp_w=700,
    usd_per_hour=4.0,
)

H100 = replace(
    H200, name="h100_sxm", title="NVIDIA H100 SXM", memory_bytes=80e9, hbm_bytes_per_s=3.35e12
)
