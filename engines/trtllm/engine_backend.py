"""What the TensorRT engine backend of TensorRT-LLM 1.0 to 1.2 needs: options and a checkpoint.

It reads no Hugging Face checkpoint: `quantize.py` of TensorRT-LLM's examples makes one in its own
format, also of weights that stay as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.model import ModelSpec
from engines.trtllm.options import llm_api_options

WEIGHT_FORMATS: Mapping[str, str] = {
    "bf16": "full_prec",
    "fp16": "full_prec",
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "w4a16_awq": "int4_awq",
    "w4a8_awq": "w4a8_awq",
    "int8_wo": "int8_wo",
    "int8_sq": "int8_sq",
    "int4_wo": "int4_wo",
}
"""`--qformat` of examples/quantization/quantize.py."""

WEIGHT_DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""`--dtype` of what is not quantized; the model's own otherwise."""

CACHE_FORMATS = ("fp8", "int8")
"""`--kv_cache_dtype` beside the precision of the model."""

RUNTIME_OPTIONS = (
    "tensor_parallel_size", "pipeline_parallel_size", "max_batch_size", "max_num_tokens",
    "max_seq_len", "enable_chunked_prefill", "scheduler_config",
)  # fmt: skip
"""Options that both backends have."""

BUILT_IN = ("tokens_per_block", "dtype")
"""Options of the KV cache that are fixed when the engine is built."""

CACHED_GRAPHS = 1000
"""CUDA graphs are captured as batch sizes occur; as many are kept as trtllm-bench keeps."""


def engine_options(config: EngineConfig, model: ModelSpec) -> dict[str, Any]:
    """Return the content of the options file: what may still be chosen once an engine is built."""
    options = llm_api_options(config, model)
    kept = {name: options[name] for name in RUNTIME_OPTIONS}
    cache = options["kv_cache_config"]
    kept["kv_cache_config"] = {k: v for k, v in cache.items() if k not in BUILT_IN}
    if config.cuda_graph_max_batch_size:
        kept["extended_runtime_perf_knob_config"] = {
            "cuda_graph_mode": True,
            "cuda_graph_cache_size": CACHED_GRAPHS,
        }
    return kept


def checkpoint_script(config: EngineConfig, model: ModelSpec) -> str:
    """Return the script that writes the checkpoint that `trtllm-build` reads.

    Raises:
        ConfigError: The precision cannot be made from what is published.
    """
    weights = WEIGHT_FORMATS.get(config.quantization)
    if weights is None or model.checkpoint_quantization not in WEIGHT_DTYPES:
        raise ConfigError(
            f"quantization={config.quantization}: no engine of {model.name} can be built in it",
            hint=f"the engine backend takes {', '.join(WEIGHT_FORMATS)} of a BF16 checkpoint",
        )
    arguments = [
        "--model_dir", '"$source"',
        "--qformat", weights,
        "--dtype", WEIGHT_DTYPES.get(config.quantization, "auto"),
        "--tp_size", str(config.tensor_parallel_size),
        "--pp_size", str(config.pipeline_parallel_size),
        "--output_dir", '"$CHECKPOINT"',
    ]  # fmt: skip
    if config.kv_cache_dtype in CACHE_FORMATS:
        arguments += ["--kv_cache_dtype", config.kv_cache_dtype]
    return (
        "set -euo pipefail\n"
        f"source=${{SOURCE:-{shlex.quote(model.hub_name)}}}\n"
        "# A checkout of TensorRT-LLM; its container has one there.\n"
        "examples=${TENSORRT_LLM:-/app/tensorrt_llm}/examples\n"
        f'python3 "$examples/quantization/quantize.py" {" ".join(arguments)}\n'
    )
