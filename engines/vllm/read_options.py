"""Reads vLLM's options, as `vllm serve --config` takes them, into a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.engine_rules import check_values
from cost_models.errors import ConfigError
from engines.reading import refuse_option, typed
from engines.vllm.flags import POLICIES, speculation

OPTIONS: Mapping[str, str] = {
    "max-model-len": "max_seq_len",
    "gpu-memory-utilization": "gpu_memory_utilization",
    "max-num-seqs": "max_batch_size",
    "max-num-batched-tokens": "max_num_tokens",
    "block-size": "tokens_per_block",
    "tensor-parallel-size": "tensor_parallel_size",
    "pipeline-parallel-size": "pipeline_parallel_size",
    "enable-prefix-caching": "enable_block_reuse",
    "enable-chunked-prefill": "enable_chunked_prefill",
    "stream-interval": "stream_interval",
    "max-cudagraph-capture-size": "cuda_graph_max_batch_size",
}
"""Options that hold the value of a knob as it is."""

WITHOUT_EFFECT = (
    "model", "tokenizer", "revision", "host", "port", "served-model-name", "download-dir",
    "load-format", "trust-remote-code", "seed", "api-key", "uvicorn-log-level", "chat-template",
    "disable-log-stats", "enable-log-requests", "api-server-count", "safetensors-load-strategy",
)  # fmt: skip
"""Options that are accepted and do not change a prediction."""

DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
"""Quantizations by `--dtype`."""

DRAFTING: Mapping[str, str] = {
    "model": "speculative_model",
    "prompt_lookup_max": "max_matching_ngram_size",
}
"""Keys of `--speculative-config` that hold the value of a knob as it is."""

COMPUTED = (
    "dtype", "quantization", "kv-cache-dtype", "num-gpu-blocks-override", "scheduling-policy",
    "async-scheduling", "enable-expert-parallel", "enforce-eager", "speculative-config",
)  # fmt: skip
"""Options from which the value of a knob follows."""


def config_from_options(
    options: Mapping[str, Any], base: EngineConfig
) -> tuple[EngineConfig, list[str]]:
    """Return the configuration of a vLLM YAML, and the options that change nothing.

    Raises:
        ConfigError: An unknown option, or a value that it cannot take.
    """
    given = dict(_plain(name, value) for name, value in options.items() if value is not None)
    values: dict[str, Any] = {}
    ignored = []
    for name, value in given.items():
        if name in OPTIONS:
            values[OPTIONS[name]] = typed(name, OPTIONS[name], value)
        elif name in WITHOUT_EFFECT:
            ignored.append(name)
        elif name not in COMPUTED:
            raise refuse_option(name, [*OPTIONS, *COMPUTED])
    config = replace(base, **values)
    config = replace(config, **_precision(given, base), **_scheduling(given, config))
    config = replace(config, **_drafting(given.get("speculative-config", {})))
    check_values(config)
    return config, ignored


def _plain(name: str, value: Any) -> tuple[str, Any]:
    """Return an option without underscores, and without `no-` in front."""
    name = name.replace("_", "-")
    if name.startswith("no-") and isinstance(value, bool):
        return name.removeprefix("no-"), not value
    return name, value


def _precision(given: Mapping[str, Any], base: EngineConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    dtype, method = given.get("dtype", "auto"), given.get("quantization")
    if dtype not in ("auto", *DTYPES):
        raise _not_taken("dtype", dtype, ("auto", *DTYPES))
    if dtype in DTYPES and base.quantization in DTYPES.values():
        # Weights that are quantized stay so.
        found["quantization"] = DTYPES[dtype]
    if method == "fp8" and base.quantization not in ("fp8", "fp8_block"):
        found["quantization"] = "fp8_dynamic"
    elif method not in (None, "fp8"):
        raise _not_taken("quantization", method, ("fp8",))
    cache = given.get("kv-cache-dtype", "auto")
    if cache != "auto":
        found["kv_cache_dtype"] = {"bfloat16": "bf16", "fp8_e4m3": "fp8"}.get(cache, cache)
    return found


def _scheduling(given: Mapping[str, Any], config: EngineConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "scheduling-policy" in given:
        orders = {policy: order for order, policy in POLICIES.items()}
        policy = given["scheduling-policy"]
        if policy not in orders:
            raise _not_taken("scheduling-policy", policy, tuple(orders))
        found["queue_order"] = orders[policy]
    if "num-gpu-blocks-override" in given:
        blocks = _checked(given, "num-gpu-blocks-override", "kv_cache_max_tokens")
        found["kv_cache_max_tokens"] = blocks * config.tokens_per_block
    if "async-scheduling" in given:
        ahead = _checked(given, "async-scheduling", "disable_overlap_scheduler")
        found["disable_overlap_scheduler"] = not ahead
    if "enable-expert-parallel" in given:
        spread = _checked(given, "enable-expert-parallel", "enable_attention_dp")
        found["moe_expert_parallel_size"] = config.tensor_parallel_size if spread else 1
    if given.get("enforce-eager"):
        found["cuda_graph_max_batch_size"] = 0
    return found


def _checked(given: Mapping[str, Any], option: str, alike: str) -> Any:
    """Return an option that must be of the type of a knob."""
    return typed(option, alike, given[option])


def _drafting(said: Any) -> dict[str, Any]:
    """Return the knobs of `--speculative-config`, JSON or a mapping."""
    if not said:
        return {}
    try:
        options = dict(json.loads(said) if isinstance(said, str) else said)
    except (TypeError, ValueError):
        raise ConfigError(f"option speculative-config={said!r} is not a JSON object") from None
    kinds = {rule.name: kind for kind, rule in speculation().items()}
    method = options.get("method")
    if method not in kinds:
        raise _not_taken("speculative-config.method", method, tuple(kinds))
    rule = speculation()[kinds[method]]
    length = options.get(rule.length_option, 0)
    found = {
        "decoding_type": kinds[method],
        "max_draft_len": typed(f"speculative-config.{rule.length_option}", "max_draft_len", length),
    }
    for name, knob in (
        ("model", "speculative_model"),
        ("prompt_lookup_max", "max_matching_ngram_size"),
    ):
        if name in options:
            found[knob] = typed(f"speculative-config.{name}", knob, options[name])
    return found


def _not_taken(option: str, value: Any, known: tuple[str, ...]) -> ConfigError:
    return ConfigError(f"option {option}={value!r}", hint=f"known: {', '.join(known)}")
