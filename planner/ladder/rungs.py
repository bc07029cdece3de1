"""The steps of the ladder, and what a step is on an engine and a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.engine_rules import EngineRules
from executor.quantization.schemes import SCHEMES, Scheme

UNQUANTIZED = "bf16"

KV_CACHE_DTYPE = "fp8"
"""What the last step stores the KV cache in."""

UNOPTIMISED: Mapping[str, Any] = {
    "cuda_graph_max_batch_size": 0,
    "disable_overlap_scheduler": True,
    "enable_chunked_prefill": False,
    "enable_block_reuse": False,
    "capacity_scheduler_policy": "STATIC_BATCH",
}
"""The baseline's `generate`: a batch runs until its longest answer ends, kernel by kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of the pipeline."""

    name: str
    title: str
    schemes: tuple[str, ...] = ()
    """Of `planner quantize`, the preferred one first; none leaves the weights as they are."""
    quantizes_kv: bool = False
    is_baseline: bool = False
    """Runs in transformers, not on the engine."""


RUNGS: tuple[Rung, ...] = (
    Rung(name="baseline", title="transformers, BF16", is_baseline=True),
    Rung(name="bf16", title="BF16"),
    Rung(name="fp8", title="FP8", schemes=("fp8", "fp8_block")),
    Rung(name="int8", title="INT8", schemes=("int8_sq", "int8_wo")),
    Rung(name="int4", title="INT4", schemes=("int4_awq", "int4_gptq")),
    Rung(name="kv", title="KV cache", quantizes_kv=True),
)
"""In the order in which they are climbed: each may cost more quality than the one before."""


def scheme_of(rung: Rung, rules: EngineRules) -> Scheme | None:
    """Return the scheme that a step takes: the first that the engine loads, else the first.

    Args:
        rung: A step.
        rules: What the engine loads.
    """
    if not rung.schemes:
        return None
    named = [SCHEMES[name] for name in rung.schemes]
    loaded = (row for row in named if _loads(row, rules))
    return next(loaded, named[0])


def config_of(rung: Rung, base: EngineConfig, *, quantization: str) -> EngineConfig:
    """Return the configuration of a step: that of the BF16 step with its precisions."""
    if rung.is_baseline:
        return replace(base, **UNOPTIMISED)
    kv = KV_CACHE_DTYPE if rung.quantizes_kv else base.kv_cache_dtype
    return replace(base, quantization=quantization, kv_cache_dtype=kv)


def _loads(row: Scheme, rules: EngineRules) -> bool:
    rule = rules.quantizations.get(row.quantization)
    return rules.name in row.loaded_by and rule is not None and rule.deployable
