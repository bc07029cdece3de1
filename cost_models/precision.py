"""The precision tables: one row for each quantization and each KV-cache dtype.

Adding a quantization is adding a row to `QUANTIZATIONS`. Which row runs on which
GPU and engine is data, in `profiles/engines/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from cost_models.errors import ConfigError

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the linear layers of a checkpoint are stored and multiplied."""

    name: str
    weight_bits: float
    """Bits of one stored weight, scales not counted."""
    scale_bits: float = 0.0
    """Bits of one scale (and zero point) for each group of weights."""
    group_size: int = 0
    """Weights that share a scale along K; 0 is one scale per output channel or tensor."""
    activation_bits: float = 16.0
    """Bits of an activation as the GEMM reads it."""
    compute: str = "bf16"
    """Tensor-core rate that applies: a key of `GpuSpec.flop_per_s`."""
    gemm_dtype: str
    """Row family of the GEMM tables that times it."""
    moe_dtype: str
    """Row family of the MoE tables that times its experts."""
    dynamic_activation_scale: bool = False
    """Whether the engine computes activation scales at run time."""
    experts_only: bool = False
    """Only expert weights are quantized; everything else stays bf16 (gpt-oss)."""
    title: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with its share of the group's scale."""
        return self.weight_bits + (self.scale_bits / self.group_size if self.group_size else 0.0)


def _table(*rows: Quantization) -> dict[str, Quantization]:
    return {row.name: row for row in rows}


QUANTIZATIONS: dict[str, Quantization] = _table(
    Quantization(
        name="bf16", weight_bits=16, gemm_dtype="bfloat16", moe_dtype="bfloat16", title="BF16"
    ),
    Quantization(
        name="fp16", weight_bits=16, gemm_dtype="bfloat16", moe_dtype="bfloat16", title="FP16"
    ),
    Quantization(
        name="fp8",
        weight_bits=8,
        activation_bits=8,
        compute="fp8",
        gemm_dtype="fp8",
        moe_dtype="fp8",
        title="FP8 per tensor, static activation scales",
    ),
    Quantization(
        name="fp8_dynamic",
        weight_bits=8,
        activation_bits=8,
        compute="fp8",
        gemm_dtype="fp8",
        moe_dtype="fp8",
        dynamic_activation_scale=True,
        title="FP8 per tensor, activation scales at run time",
    ),
    Quantization(
        name="fp8_block",
        weight_bits=8,
        scale_bits=32,
        group_size=128 * 128,
        activation_bits=8,
        compute="fp8",
        gemm_dtype="fp8_block",
        moe_dtype="fp8_block",
        dynamic_activation_scale=True,
        title="FP8 in 128×128 blocks",
    ),
    Quantization(
        name="int8_wo",
        weight_bits=8,
        gemm_dtype="int8_wo",
        moe_dtype="bfloat16",
        title="INT8 weight-only, per channel",
    ),
    Quantization(
        name="int8_sq",
        weight_bits=8,
        activation_bits=8,
        compute="int8",
        gemm_dtype="sq",
        moe_dtype="fp8",
        dynamic_activation_scale=True,
        title="INT8 SmoothQuant (W8A8)",
    ),
    Quantization(
        name="int4_wo",
        weight_bits=4,
        gemm_dtype="int4_wo",
        moe_dtype="bfloat16",
        title="INT4 weight-only, per channel",
    ),
    Quantization(
        name="w4a16_awq",
        weight_bits=4,
        scale_bits=16,
        group_size=128,
        gemm_dtype="int4_wo",
        moe_dtype="bfloat16",
        title="INT4 AWQ, groups of 128",
    ),
    Quantization(
        name="w4a16_gptq",
        weight_bits=4,
        scale_bits=20,
        group_size=128,
        gemm_dtype="int4_wo",
        moe_dtype="bfloat16",
        title="INT4 GPTQ, groups of 128 with zero points",
    ),
    Quantization(
        name="w4a8_awq",
        weight_bits=4,
        scale_bits=16,
        group_size=128,
        activation_bits=8,
        compute="fp8",
        gemm_dtype="int4_wo",
        moe_dtype="fp8",
        title="INT4 AWQ weights, FP8 activations",
    ),
    Quantization(
        name="w4a16_mxfp4",
        weight_bits=4,
        scale_bits=8,
        group_size=32,
        gemm_dtype="bfloat16",
        moe_dtype="w4a16_mxfp4",
        experts_only=True,
        title="MXFP4 experts, BF16 elsewhere",
    ),
    Quantization(
        name="w4a8_mxfp4_mxfp8",
        weight_bits=4,
        scale_bits=8,
        group_size=32,
        activation_bits=8.25,
        compute="fp8",
        gemm_dtype="bfloat16",
        moe_dtype="w4a8_mxfp4_mxfp8",
        experts_only=True,
        dynamic_activation_scale=True,
        title="MXFP4 experts with MXFP8 activations, BF16 elsewhere",
    ),
    Quantization(
        name="nvfp4",
        weight_bits=4,
        scale_bits=8,
        group_size=16,
        activation_bits=4.5,
        compute="fp4",
        gemm_dtype="nvfp4",
        moe_dtype="nvfp4",
        title="NVFP4",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDtype:
    """How a cached key or value is stored."""

    name: str
    bits: float
    """Bits of one cached element, with its share of block scales."""
    attention_dtype: str
    """Row family of the attention tables that times it."""
    title: str


KV_DTYPES: dict[str, KvDtype] = {
    row.name: row
    for row in (
        KvDtype(name="bf16", bits=16, attention_dtype="bfloat16", title="BF16"),
        KvDtype(name="fp16", bits=16, attention_dtype="bfloat16", title="FP16"),
        KvDtype(name="fp8", bits=8, attention_dtype="fp8", title="FP8, one scale per tensor"),
        KvDtype(name="int8", bits=8, attention_dtype="fp8", title="INT8, one scale per tensor"),
        KvDtype(name="nvfp4", bits=4.5, attention_dtype="fp8", title="NVFP4, one FP8 scale per 16"),
    )
}


def quantization(name: str) -> Quantization:
    """Return the row of that name.

    Raises:
        ConfigError: No such quantization.
    """
    return _lookup(QUANTIZATIONS, name, "quantization")


def kv_dtype(name: str) -> KvDtype:
    """Return the row of that name.

    Raises:
        ConfigError: No such KV-cache dtype.
    """
    return _lookup(KV_DTYPES, name, "kv_cache_dtype")


def _lookup(table: dict[str, Row], name: str, knob: str) -> Row:
    try:
        return table[name]
    except KeyError:
        raise ConfigError(
            f"{knob}={name!r} is unknown", hint=f"known: {', '.join(sorted(table))}"
        ) from None
