"""The schemes that can be built: how each is calibrated, in which form it is written, who loads it.

Adding a scheme is adding a row to `SCHEMES`. Which GPU generation runs it is told by the engines'
own tables (`profiles/engines/*.yaml`), through the row's name in `cost_models.precision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cost_models.engine_rules import PrecisionRule
from cost_models.errors import ConfigError
from engines.registry import find_engine, is_engine, list_engines

FP8_BLOCK = 128
"""Rows and columns that share a scale in FP8 blocks."""

SMALLEST_TILE = 16
"""Kernels and packed words take weights in multiples of it."""


class Form(StrEnum):
    """How a checkpoint is laid out on disk."""

    MODELOPT = "modelopt"
    """ModelOpt's unified Hugging Face export: `hf_quant_config.json` and its tensors."""
    FP8_BLOCKS = "fp8"
    """`quant_method: fp8` with `weight_block_size`, as DeepSeek-V3 was published."""
    COMPRESSED_TENSORS = "compressed-tensors"
    """`quant_method: compressed-tensors`, as llm-compressor writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way to quantize the linear layers of a model."""

    name: str
    quantization: str
    """Its row in `cost_models.precision.QUANTIZATIONS`."""
    preset: str
    """ModelOpt's configuration of that name."""
    form: Form
    algorithm: Mapping[str, Any] | None = None
    """Calibration other than the preset's."""
    num_bits: int = 8
    group_size: int = 0
    """Weights that share a scale along K; 0 is one scale per output channel or tensor."""
    unsmoothed: tuple[str, ...] = ()
    """Layers whose input no norm precedes, so that nothing can take their smoothing."""
    int8_activations: bool = False
    loaded_by_transformers: str = ""
    """Where the loading code of transformers stands; empty where it has none."""

    @property
    def loaded_by(self) -> Mapping[str, str]:
        """Where the loading code stands, by engine; an engine that is not named cannot load it."""
        found = {engine: find_engine(engine).loads.get(self.name) for engine in list_engines()}
        found["transformers"] = self.loaded_by_transformers
        return {engine: source for engine, source in found.items() if source}

    @property
    def divisors(self) -> tuple[int, int]:
        """What rows and columns of a weight must be a multiple of, for blocks, groups, packing."""
        if self.form is Form.FP8_BLOCKS:
            return (FP8_BLOCK, FP8_BLOCK)
        return (SMALLEST_TILE, max(self.group_size, SMALLEST_TILE))

    def compute_capabilities(self, engine: str) -> tuple[int, ...]:
        """Return the GPUs that run it, as 90 for 9.0; empty where the engine cannot load it."""
        rule = self._rule(engine)
        return rule.sm if rule is not None and engine in self.loaded_by else ()

    def why_not(self, engine: str) -> str:
        """Return why an engine cannot load it, as its profile has it."""
        rule = self._rule(engine)
        return (rule.reason if rule is not None else "") or "it takes another form"

    def _rule(self, engine: str) -> PrecisionRule | None:
        """Return what an engine's profile says of the precision; transformers has none."""
        if not is_engine(engine):
            return None
        return find_engine(engine).rules.quantizations.get(self.quantization)


HF_FP8 = "transformers 5 quantizers/quantizer_finegrained_fp8.py"
HF_COMPRESSED = "transformers 5 quantizers/quantizer_compressed_tensors.py"


def _table(*rows: Scheme) -> dict[str, Scheme]:
    return {row.name: row for row in rows}


SCHEMES: Mapping[str, Scheme] = _table(
    Scheme(
        name="fp8",
        quantization="fp8",
        preset="FP8_DEFAULT_CFG",
        form=Form.MODELOPT,
    ),
    Scheme(
        name="fp8_block",
        quantization="fp8_block",
        preset="FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
        form=Form.FP8_BLOCKS,
        loaded_by_transformers=HF_FP8,
    ),
    Scheme(
        name="int8_wo",
        quantization="int8_wo",
        preset="INT8_WEIGHT_ONLY_CFG",
        form=Form.COMPRESSED_TENSORS,
        loaded_by_transformers=HF_COMPRESSED,
    ),
    Scheme(
        name="int8_sq",
        quantization="int8_sq",
        preset="INT8_SMOOTHQUANT_CFG",
        form=Form.COMPRESSED_TENSORS,
        unsmoothed=("*o_proj*", "*down_proj*"),
        int8_activations=True,
        loaded_by_transformers=HF_COMPRESSED,
    ),
    Scheme(
        name="int4_awq",
        quantization="w4a16_awq",
        preset="INT4_AWQ_CFG",
        form=Form.MODELOPT,
        num_bits=4,
        group_size=128,
    ),
    Scheme(
        name="int4_gptq",
        quantization="w4a16_gptq",
        preset="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        algorithm={"method": "gptq", "layerwise": {"enable": True}},
        form=Form.COMPRESSED_TENSORS,
        num_bits=4,
        group_size=128,
        loaded_by_transformers=HF_COMPRESSED,
    ),
    Scheme(
        name="int4_rtn",
        quantization="int4_wo",
        preset="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        form=Form.COMPRESSED_TENSORS,
        num_bits=4,
        group_size=128,
        loaded_by_transformers=HF_COMPRESSED,
    ),
    Scheme(
        name="w4a8_awq",
        quantization="w4a8_awq",
        preset="W4A8_AWQ_BETA_CFG",
        form=Form.MODELOPT,
        num_bits=4,
        group_size=128,
    ),
    Scheme(
        name="nvfp4",
        quantization="nvfp4",
        preset="NVFP4_DEFAULT_CFG",
        form=Form.MODELOPT,
        num_bits=4,
        group_size=16,
    ),
)
"""By the name on the command line; `int4_rtn` is plain rounding, to compare AWQ and GPTQ with."""

KV_PRESETS: Mapping[str, str] = {"bf16": "", "fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
"""ModelOpt's configuration of each KV-cache dtype whose scales a checkpoint can carry."""


def scheme(name: str) -> Scheme:
    """Return the scheme of that name.

    Raises:
        ConfigError: No such scheme.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise ConfigError(
            f"--scheme {name!r} is unknown", hint=f"known: {', '.join(SCHEMES)}"
        ) from None


def check_kv_cache_dtype(row: Scheme, kv_cache_dtype: str) -> None:
    """Refuse a KV-cache dtype that the scheme's checkpoint cannot carry.

    Raises:
        ConfigError: No such dtype, or no engine takes the pair.
    """
    if kv_cache_dtype not in KV_PRESETS:
        raise ConfigError(
            f"--kv-cache-dtype {kv_cache_dtype}: no engine loads a checkpoint with it",
            hint=f"known: {', '.join(KV_PRESETS)}; `planner quality --kv-cache-dtype` judges int8",
        )
    needed = [
        rule.with_quantizations
        for engine in list_engines()
        if (rule := find_engine(engine).rules.kv_cache_dtypes.get(kv_cache_dtype))
    ]
    if needed and all(weights and row.quantization not in weights for weights in needed):
        weights = dict.fromkeys(name for names in needed for name in names)
        raise ConfigError(
            f"--kv-cache-dtype {kv_cache_dtype} needs weights in "
            f"{' or '.join(weights)}, not {row.name}"
        )
