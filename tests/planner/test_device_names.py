"""Names that NVML gives, and the profiles that they mean."""

import pytest

from cost_models.errors import ProfileError
from planner.local_gpu import profile_of_device

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "memory_mib", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "h100_sxm"),
        ("NVIDIA H100 PCIe", 81559, "h100_pcie"),
        ("NVIDIA H100 NVL", 95830, "h100_nvl"),
        ("NVIDIA H200", 143771, "h200_sxm"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100_sxm"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100_sxm_40gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx_4090"),
        ("NVIDIA L40S", 46068, "l40s"),
    ],
)
def test_the_profile_of_a_device(name: str, memory_mib: int, profile: str) -> None:
    assert profile_of_device(name, float(memory_mib * MIB)) == profile


def test_an_unknown_device_is_not_guessed() -> None:
    with pytest.raises(ProfileError, match="no profile for 'NVIDIA Tesla K80'"):
        profile_of_device("NVIDIA Tesla K80", 12.0 * 1024 * MIB)
