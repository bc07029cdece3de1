"""What a knob is called by the engine that ran: TensorRT-LLM's option, or vLLM's flag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.knobs import OPTION_PATHS

VLLM_FLAGS: Mapping[str, str] = {
    "max_batch_size": "--max-num-seqs",
    "max_num_tokens": "--max-num-batched-tokens",
    "max_seq_len": "--max-model-len",
    "kv_cache_dtype": "--kv-cache-dtype",
    "kv_cache_max_tokens": "--num-gpu-blocks-override, in tokens:",
    "tokens_per_block": "--block-size",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "free_gpu_memory_fraction": "--gpu-memory-utilization",
    "enable_block_reuse": "--enable-prefix-caching",
    "enable_chunked_prefill": "--enable-chunked-prefill",
    "cuda_graph_max_batch_size": "--max-cudagraph-capture-size",
    "quantization": "--quantization",
    "tensor_parallel_size": "--tensor-parallel-size",
    "queue_order": "--scheduling-policy",
    "disable_overlap_scheduler": "--async-scheduling",
    "stream_interval": "--stream-interval",
}
"""Flags of `vllm serve` 0.25."""

OF_THE_CHECKPOINT = "quantization of the checkpoint"
"""TensorRT-LLM's PyTorch backend reads it from there; no option sets it."""

_OPTIONS = {knob: path for path, knob in OPTION_PATHS.items()} | {
    "quantization": OF_THE_CHECKPOINT,
    "gpu_memory_utilization": "kv_cache_config.free_gpu_memory_fraction",
}


def engine_name(knob: str, engine: str) -> str:
    """Return what an engine calls a knob; TensorRT-LLM's name where it has none of its own."""
    if engine == "vllm" and knob in VLLM_FLAGS:
        return VLLM_FLAGS[knob]
    return _OPTIONS.get(knob, knob)


def change_words(knob: str, before: Any, after: Any, engine: str) -> str:
    """Return `option before → after` as the engine spells it."""
    return f"{engine_name(knob, engine)} {_plain(knob, before)} → {_plain(knob, after)}"


def _plain(knob: str, value: Any) -> str:
    if knob == "kv_cache_max_tokens" and value == 0:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)
