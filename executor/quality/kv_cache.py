"""A KV cache that stores what an engine's quantized cache would give back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from cost_models.errors import ConfigError
from executor.quality import rounding

DTYPES = ("auto", "bf16", "fp8", "int8", "nvfp4")
"""`auto` is what the checkpoint asks for."""

INT8_LARGEST = 127.0

KEYS, VALUES = "k", "v"


def new_cache(model: Any, kv_cache_dtype: str, scales: Mapping[str, float]) -> dict[str, Any]:
    """Return the arguments that give one pass or generation an empty cache that rounds.

    Everything is read back as it was stored, the prompt's own keys and values too.

    Args:
        model: Whose pass it is.
        kv_cache_dtype: As the engines call it.
        scales: By layer and part, as `3.k`; what is not named has a scale of 1, as the engines
            take where a checkpoint carries none.
    """
    if kv_cache_dtype in ("bf16", "fp16", "auto"):
        return {}
    rules = {"fp8": rounding.fp8, "int8": rounding.int8, "nvfp4": _nvfp4}
    if kv_cache_dtype not in rules:
        raise ConfigError(
            f"--kv-cache-dtype {kv_cache_dtype} is unknown", hint=f"known: {', '.join(DTYPES)}"
        )
    rule = rules[kv_cache_dtype]
    cache = _cache(lambda part, layer, x: rule(x, scales.get(f"{layer}.{part}", 1.0)))
    return _argument(model, cache)


def int8_scales(model: Any, tokens: Any) -> dict[str, float]:
    """Return the INT8 scales of a cache, calibrated on some tokens: no checkpoint has them."""
    import torch  # noqa: PLC0415  optional

    largest: dict[str, float] = {}

    def observe(part: str, layer: int, values: Any) -> Any:
        largest[f"{layer}.{part}"] = float(values.abs().max())
        return values

    with torch.inference_mode():
        model(tokens, use_cache=True, **_argument(model, _cache(observe)))
    return {name: value / INT8_LARGEST for name, value in largest.items()}


def _nvfp4(values: Any, scale: float) -> Any:
    """NVFP4 over the scale that FP8 would have, as ModelOpt stores it for both.

    Its tensor scale maps the same largest value to 6 in E2M1 times 448 in E4M3.
    """
    tensor_scale = scale if scale == 1.0 else scale / rounding.FP4_LARGEST
    return rounding.nvfp4(values, tensor_scale)


def _argument(model: Any, cache: Any) -> dict[str, Any]:
    """Name the cache as this version of transformers does: it renamed it within version 5."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def _cache(change: Any) -> Any:
    """Return transformers' growing cache with a change to what goes in."""
    from transformers import DynamicCache  # noqa: PLC0415  optional

    class ChangingCache(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            keys = change(KEYS, layer_idx, key_states)
            values = change(VALUES, layer_idx, value_states)
            return super().update(keys, values, layer_idx, *args, **kwargs)

    return ChangingCache()
