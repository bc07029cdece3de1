"""vLLM's options of a configuration: flags of `vllm serve` 0.25, and keys of its YAML.

An option is its flag's name without the dashes; `true` and `false` stand for `--name` and
`--no-name`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.engine_profile_io import newest_profile, read_rules
from cost_models.engine_rules import SpeculationRule
from cost_models.model import ModelSpec
from engines.base import SHIPPED_PROFILES
from engines.vllm.cuda_graphs import largest_graph_tokens

NAME = "vllm"
"""The name of the engine."""

QUANTIZATION_OPTIONS: Mapping[str, tuple[str, str]] = {
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "fp8": ("quantization", "fp8"),
    "fp8_dynamic": ("quantization", "fp8"),
}
"""Options of the precisions that vLLM makes itself; all others are read from the checkpoint."""

POLICIES: Mapping[str, str] = {"FIRST_COME_FIRST_SERVED": "fcfs", "PRIORITY": "priority"}
"""`--scheduling-policy` by `queue_order`."""


def serve_options(config: EngineConfig, *, max_seq_len: int) -> dict[str, Any]:
    """Return the options of `vllm serve` for a configuration.

    Args:
        config: The configuration to serve.
        max_seq_len: The longest sequence that must be taken.
    """
    options: dict[str, Any] = {
        "max-model-len": max_seq_len,
        "gpu-memory-utilization": config.gpu_memory_utilization,
        "max-num-seqs": config.max_batch_size,
        "max-num-batched-tokens": config.max_num_tokens,
        "block-size": config.tokens_per_block,
        "tensor-parallel-size": config.tensor_parallel_size,
        "pipeline-parallel-size": config.pipeline_parallel_size,
        "enable-prefix-caching": config.enable_block_reuse,
        "scheduling-policy": POLICIES.get(config.queue_order, config.queue_order),
        "stream-interval": config.stream_interval,
    }
    if config.quantization in QUANTIZATION_OPTIONS:
        name, value = QUANTIZATION_OPTIONS[config.quantization]
        options[name] = value
    if config.kv_cache_dtype not in ("bf16", "fp16"):
        options["kv-cache-dtype"] = config.kv_cache_dtype
    if config.kv_cache_max_tokens:
        blocks = config.kv_cache_max_tokens // config.tokens_per_block
        options["num-gpu-blocks-override"] = max(blocks, 1)
    if not config.enable_chunked_prefill:
        options["enable-chunked-prefill"] = False
    if config.moe_expert_parallel_size > 1:
        options["enable-expert-parallel"] = True
    if config.disable_overlap_scheduler:
        # Left out otherwise: vLLM schedules ahead by itself where the way to draft allows it.
        options["async-scheduling"] = False
    options |= _graph_options(config)
    if config.speculates:
        options["speculative-config"] = speculative_options(config)
    return options


def options_of(config: EngineConfig, model: ModelSpec) -> dict[str, Any]:
    """Return the options of `vllm serve` for a configuration of a model."""
    longest = config.max_seq_len or model.max_position_embeddings
    return serve_options(config, max_seq_len=longest)


def speculative_options(config: EngineConfig) -> dict[str, Any]:
    """Return what `--speculative-config` says of a configuration that drafts."""
    rule = speculation()[config.decoding_type]
    found: dict[str, Any] = {"method": rule.name, rule.length_option: config.max_draft_len}
    if config.decoding_type == "NGram":
        found |= {"prompt_lookup_max": config.max_matching_ngram_size, "prompt_lookup_min": 1}
    if rule.needs_model:
        found["model"] = config.speculative_model
    return found


def speculation() -> Mapping[str, SpeculationRule]:
    """Return the ways to draft, by decoding type."""
    return read_rules(newest_profile(SHIPPED_PROFILES, NAME)).speculation


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    return [word for name, value in options.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield f"--{name}" if value else f"--no-{name}"
        return
    yield f"--{name}"
    if isinstance(value, Mapping):
        yield json.dumps(value)
    else:
        yield f"{value:g}" if isinstance(value, float) else str(value)


def _graph_options(config: EngineConfig) -> dict[str, Any]:
    """Return how far batches are captured; vLLM would capture to its own limit if not told."""
    largest = largest_graph_tokens(config)
    return {"max-cudagraph-capture-size": largest} if largest else {"enforce-eager": True}
