"""Limits that a TensorRT-LLM benchmark sets when a run does not state them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from cost_models.engine import EngineConfig
from cost_models.gpu import GpuSpec
from cost_models.model import ModelSpec
from cost_models.weights import parameter_count
from engines.base import MeasuredLoad

MOST_SEQUENCES = 4096
MOST_TOKENS = 32768

WEIGHT_BYTES: Mapping[str, float] = {"fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5}
KV_BYTES: Mapping[str, float] = {"fp8": 1.0, "nvfp4": 0.5}
"""Bytes of an element as the rule counts them; 2 where absent."""


def tuned_limits(
    config: EngineConfig, *, model: ModelSpec, gpu: GpuSpec, isl: float, osl: float
) -> EngineConfig:
    """Return a configuration with the batch and token limits of `trtllm-bench throughput`.

    Source: `calc_engine_setting` in tensorrt_llm/bench/build/tuning.py, TensorRT-LLM 1.2.

    Args:
        config: Its own limits are replaced.
        model: What is served.
        gpu: Where.
        isl: Mean prompt tokens of the dataset.
        osl: Mean output tokens.
    """
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    weight_bytes = parameter_count(model) * WEIGHT_BYTES.get(config.quantization, 2.0)
    room = (gpu.memory_bytes * tp * pp - weight_bytes) * config.free_gpu_memory_fraction
    held = min(room / (_kv_bytes_per_token(model, config) * (isl + osl)), MOST_SEQUENCES) / pp
    tokens = min(held * (1 + isl / osl), MOST_TOKENS)
    batch = _rounded_batch(max(held, 1.0))
    budget = _rounded_tokens(tokens)
    if not config.enable_chunked_prefill:
        budget = max(budget, math.ceil(isl) + batch)
    return replace(config, max_batch_size=batch, max_num_tokens=budget)


def with_unstated_limits(
    config: EngineConfig, stated: Collection[str], load: MeasuredLoad
) -> EngineConfig:
    """Return a configuration with the limits that a run must have had without stating them.

    Offline runs are trtllm-bench's, which tunes its own. A server that was given no token
    budget and served whole prompts had room for the longest beside a full batch.

    Args:
        config: What the run states, at the engine's defaults where it states nothing.
        stated: The knobs that it states.
        load: What it served.
    """
    if "max_num_tokens" in stated:
        return config
    if load.is_offline and "max_batch_size" not in stated:
        return tuned_limits(
            config, model=load.model, gpu=load.gpu, isl=load.mean_isl, osl=load.mean_osl
        )
    if not load.longest_isl or config.enable_chunked_prefill:
        return config
    batch = min(config.max_batch_size, round(load.concurrency) or config.max_batch_size)
    needed = round(load.longest_isl) + batch
    return replace(config, max_num_tokens=max(config.max_num_tokens, needed))


def _kv_bytes_per_token(model: ModelSpec, config: EngineConfig) -> float:
    """The rule's own count, over all ranks; it knows neither MLA nor sliding windows."""
    head_dim = model.layer_groups[0].attention.head_dim
    heads = max(config.tensor_parallel_size, model.num_kv_heads)
    return 2 * model.num_layers * heads * head_dim * KV_BYTES.get(config.kv_cache_dtype, 2.0)


def _rounded_batch(sequences: float) -> int:
    if sequences < 256:
        return max(64, _up(sequences, 32))
    return _up(sequences, 128 if sequences < 1024 else 256)


def _rounded_tokens(tokens: float) -> int:
    if tokens < 4096:
        return max(2048, _up(tokens, 256))
    return _up(tokens, 512 if tokens < 8192 else 1024)


def _up(value: float, step: int) -> int:
    return math.ceil(value / step) * step
