"""Reads TensorRT-LLM's options, as `trtllm-serve --config` takes them, into a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cost_models.engine import KNOBS, EngineConfig
from cost_models.engine_rules import check_values
from cost_models.errors import ConfigError
from engines.reading import flattened, refuse_option, typed

OPTION_PATHS: Mapping[str, str] = {
    "kv_cache_config.dtype": "kv_cache_dtype",
    "kv_cache_config.free_gpu_memory_fraction": "free_gpu_memory_fraction",
    "kv_cache_config.enable_block_reuse": "enable_block_reuse",
    "kv_cache_config.enable_partial_reuse": "enable_partial_reuse",
    "kv_cache_config.host_cache_size": "host_cache_size",
    "kv_cache_config.tokens_per_block": "tokens_per_block",
    "kv_cache_config.max_tokens": "kv_cache_max_tokens",
    "scheduler_config.capacity_scheduler_policy": "capacity_scheduler_policy",
    "scheduler_config.context_chunking_policy": "context_chunking_policy",
    "moe_config.backend": "moe_backend",
    "cuda_graph_config.max_batch_size": "cuda_graph_max_batch_size",
    "cuda_graph_config.enable_padding": "cuda_graph_padding",
    "speculative_config.decoding_type": "decoding_type",
    "speculative_config.max_draft_len": "max_draft_len",
    "speculative_config.num_nextn_predict_layers": "max_draft_len",
    "speculative_config.speculative_model": "speculative_model",
    "speculative_config.speculative_model_dir": "speculative_model",
    "speculative_config.max_matching_ngram_size": "max_matching_ngram_size",
    "torch_compile_config.enable_piecewise_cuda_graph": "enable_piecewise_cuda_graph",
}
"""TensorRT-LLM's nested options that are knobs of ours, by path."""

WITHOUT_EFFECT = (
    "backend", "print_iter_log", "enable_iter_perf_stats", "enable_iter_req_stats",
    "num_postprocess_workers", "trust_remote_code", "return_perf_metrics", "load_format",
    "tokenizer", "model", "revision", "max_beam_width", "skip_tokenizer_init",
    "attention_dp_config", "cache_transceiver_config", "gpus_per_node",
    "batch_wait_timeout_ms", "batch_wait_timeout_iters", "env_overrides", "attn_backend",
    "sampler_type", "guided_decoding_backend", "reasoning_parser", "perf_metrics_max_requests",
    "moe_config.max_num_tokens", "moe_tensor_parallel_size", "torch_compile_config",
    "kv_cache_config.copy_on_partial_reuse", "cuda_graph_config.batch_sizes",
    "speculative_config.eagle3_one_model", "speculative_config.mtp_eagle_one_model",
    "speculative_config.is_keep_all", "speculative_config.is_use_oldest",
    "speculative_config.is_public_pool", "speculative_config.allow_advanced_sampling",
)  # fmt: skip
"""Options that are accepted and do not change a prediction."""

DTYPES: Mapping[str, str] = {"float16": "fp16", "bfloat16": "bf16"}
"""Quantizations by `dtype`."""

MTP_DRAFT_LEN = 1
"""`num_nextn_predict_layers` where a YAML does not say."""


def config_from_options(
    options: Mapping[str, Any], base: EngineConfig
) -> tuple[EngineConfig, list[str]]:
    """Return the configuration of a TensorRT-LLM YAML, and the options that change nothing.

    Raises:
        ConfigError: An unknown option, or a value that it cannot take.
    """
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for path, value in flattened(options):
        knob = OPTION_PATHS.get(path, path if "." not in path else "")
        if knob in KNOBS and value is not None and knob not in ("quantization",):
            values[knob] = typed(path, knob, value)
        elif path == "dtype":
            values |= _precision(value, base)
        elif path == "cuda_graph_config":
            values["cuda_graph_max_batch_size"] = 0
        elif path in WITHOUT_EFFECT or path.split(".")[0] in WITHOUT_EFFECT:
            ignored.append(path)
        elif value is not None:
            raise refuse_option(path, [*OPTION_PATHS, *KNOBS])
    sizes = (options.get("cuda_graph_config") or {}).get("batch_sizes")
    if sizes:
        values["cuda_graph_max_batch_size"] = max(sizes)
    if values.get("decoding_type") == "MTP":
        values.setdefault("max_draft_len", MTP_DRAFT_LEN)
    if values.get("kv_cache_dtype") == "auto":
        values["kv_cache_dtype"] = base.kv_cache_dtype
    config = replace(base, **values)
    check_values(config)
    return config, ignored


def _precision(dtype: Any, base: EngineConfig) -> dict[str, str]:
    """Return the precision that `dtype` sets: of weights that are not quantized alone."""
    if dtype in (None, "auto"):
        return {}
    if dtype not in DTYPES:
        known = ", ".join(("auto", *DTYPES))
        raise ConfigError(f"option dtype={dtype!r}", hint=f"known: {known}")
    return {"quantization": DTYPES[dtype]} if base.quantization in DTYPES.values() else {}
