"""TensorRT-LLM's options of a configuration, and what version 1.2 would refuse in them.

The YAML beats the command line in trtllm-serve and trtllm-bench, so everything that
matters stands in it, also what the two would otherwise default differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.engine_profile_io import newest_profile, read_rules
from cost_models.engine_rules import SpeculationRule
from cost_models.errors import ConfigError
from cost_models.model import ModelSpec
from cost_models.profile_io import load_model
from cost_models.speculation import SYNCHRONOUS
from engines.base import SHIPPED_PROFILES
from engines.reading import flattened

NAME = "trtllm"
"""The name of the engine."""

EMITTED_OPTIONS: Mapping[str, type | tuple[Any, ...]] = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "moe_expert_parallel_size": int,
    "moe_tensor_parallel_size": int,
    "enable_attention_dp": bool,
    "max_batch_size": int,
    "max_num_tokens": int,
    "max_seq_len": int,
    "enable_chunked_prefill": bool,
    "disable_overlap_scheduler": bool,
    "stream_interval": int,
    "dtype": ("float16",),
    "allreduce_strategy": (
        "AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL",
        "NCCL_SYMMETRIC",
    ),
    "kv_cache_config.enable_block_reuse": bool,
    "kv_cache_config.enable_partial_reuse": bool,
    "kv_cache_config.host_cache_size": int,
    "kv_cache_config.free_gpu_memory_fraction": float,
    "kv_cache_config.tokens_per_block": int,
    "kv_cache_config.max_tokens": int,
    "kv_cache_config.dtype": ("auto", "fp8", "nvfp4"),
    "scheduler_config.capacity_scheduler_policy": (
        "GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH",
    ),
    "scheduler_config.context_chunking_policy": ("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"),
    "cuda_graph_config.enable_padding": bool,
    "cuda_graph_config.max_batch_size": int,
    "speculative_config.decoding_type": ("NGram", "DraftTarget", "Eagle", "MTP"),
    "speculative_config.max_draft_len": int,
    "speculative_config.num_nextn_predict_layers": int,
    "speculative_config.max_matching_ngram_size": int,
    "speculative_config.speculative_model": str,
    "torch_compile_config.enable_piecewise_cuda_graph": bool,
    "moe_config.backend": (
        "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON",
    ),
}  # fmt: skip
"""Every option that the YAML may hold, with its type or its values (TensorRT-LLM 1.2.1)."""


def llm_api_options(config: EngineConfig, model: ModelSpec) -> dict[str, Any]:
    """Return the content of llm_api_options.yaml."""
    kv_cache: dict[str, Any] = {
        "enable_block_reuse": config.enable_block_reuse,
        "free_gpu_memory_fraction": config.free_gpu_memory_fraction,
        "tokens_per_block": config.tokens_per_block,
        "dtype": config.kv_cache_dtype if config.kv_cache_dtype in ("fp8", "nvfp4") else "auto",
    }
    if not config.enable_partial_reuse:
        kv_cache["enable_partial_reuse"] = False
    if config.host_cache_size:
        kv_cache["host_cache_size"] = config.host_cache_size
    if config.kv_cache_max_tokens:
        kv_cache["max_tokens"] = config.kv_cache_max_tokens
    scheduler = {"capacity_scheduler_policy": config.capacity_scheduler_policy}
    if config.enable_chunked_prefill:
        scheduler["context_chunking_policy"] = config.context_chunking_policy
    options: dict[str, Any] = {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enable_attention_dp": config.enable_attention_dp,
        "max_batch_size": config.max_batch_size,
        "max_num_tokens": config.max_num_tokens,
        "max_seq_len": config.max_seq_len or model.max_position_embeddings,
        "enable_chunked_prefill": config.enable_chunked_prefill,
        "disable_overlap_scheduler": config.disable_overlap_scheduler or _waits_for_drafts(config),
        "stream_interval": config.stream_interval,
        "kv_cache_config": kv_cache,
        "scheduler_config": scheduler,
        "cuda_graph_config": _cuda_graph_options(config),
    }
    if model.is_moe:
        options["moe_expert_parallel_size"] = config.moe_expert_parallel_size
        options["moe_tensor_parallel_size"] = config.moe_tensor_parallel_size
        options["moe_config"] = {"backend": config.moe_backend}
    if config.speculates:
        options["speculative_config"] = _speculative_options(config)
    if config.quantization == "fp16":
        options["dtype"] = "float16"
    if config.enable_piecewise_cuda_graph:
        options["torch_compile_config"] = {"enable_piecewise_cuda_graph": True}
    if config.allreduce_strategy != "AUTO":
        options["allreduce_strategy"] = config.allreduce_strategy
    return options


def _waits_for_drafts(config: EngineConfig) -> bool:
    return config.speculates and config.decoding_type in SYNCHRONOUS


def _speculative_options(config: EngineConfig) -> dict[str, Any]:
    """Return `speculative_config` in the engine's own words."""
    kind = config.decoding_type
    rule = _speculation().get(kind)
    if rule is None:
        raise ConfigError(f"TensorRT-LLM 1.2 would refuse decoding_type={kind}")
    found: dict[str, Any] = {"decoding_type": rule.name, rule.length_option: config.max_draft_len}
    if kind == "NGram":
        found["max_matching_ngram_size"] = config.max_matching_ngram_size
    if rule.needs_model:
        found["speculative_model"] = _draft_checkpoint(config)
    return found


def _draft_checkpoint(config: EngineConfig) -> str:
    """Return where the draft's weights are: a path as given, else the name on the hub."""
    name = config.speculative_model
    if config.decoding_type != "DraftTarget" or Path(name).exists():
        return name
    return load_model(name).hub_name


def option_problems(options: Mapping[str, Any]) -> list[str]:
    """Return what TensorRT-LLM 1.2 would refuse in the options that we write."""
    problems = []
    for path, value in flattened(options):
        if path == "cuda_graph_config" and value is None:
            continue
        expected = EMITTED_OPTIONS.get(path)
        if expected is None:
            problems.append(f"{path}: not an option")
        elif isinstance(expected, tuple):
            if value not in expected:
                problems.append(f"{path}={value!r}: accepted: {', '.join(expected)}")
        elif type(value) is not expected and not (expected is float and type(value) is int):
            problems.append(f"{path}={value!r}: not of type {expected.__name__}")
    return problems


def _cuda_graph_options(config: EngineConfig) -> dict[str, Any] | None:
    if config.cuda_graph_max_batch_size == 0:
        return None
    return {
        "enable_padding": config.cuda_graph_padding,
        "max_batch_size": min(config.cuda_graph_max_batch_size, config.max_batch_size),
    }


def checked_options(config: EngineConfig, model: ModelSpec) -> dict[str, Any]:
    """Return the content of llm_api_options.yaml, once nothing in it would be refused.

    Raises:
        ConfigError: With the first option that would be.
    """
    options = llm_api_options(config, model)
    problems = option_problems(options)
    if problems:
        raise ConfigError(f"TensorRT-LLM 1.2 would refuse {problems[0]}")
    return options


def _speculation() -> Mapping[str, SpeculationRule]:
    return read_rules(newest_profile(SHIPPED_PROFILES, NAME)).speculation
