"""vLLM 0.25, as the registry hands it out."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.engine import EngineConfig
from cost_models.engine_traits import EngineTraits
from engines.base import SHIPPED_CONSTANTS, EngineSpec
from engines.vllm.cuda_graphs import captured_batch_sizes, largest_graph_tokens
from engines.vllm.flags import NAME, options_of
from engines.vllm.read_options import config_from_options

FLAGS: Mapping[str, str] = {
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
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "moe_expert_parallel_size": "--enable-expert-parallel, ranks:",
    "queue_order": "--scheduling-policy",
    "disable_overlap_scheduler": "--no-async-scheduling",
    "stream_interval": "--stream-interval",
}
"""The flag of `vllm serve` that each knob is sent by; drafting goes by `--speculative-config`."""

MODELOPT_LOADER = "vllm 0.25.1 layers/quantization/modelopt.py QUANT_ALGOS"
COMPRESSED_LOADER = "vllm 0.25.1 compressed_tensors/schemes"
PACKED_LOADER = f"{COMPRESSED_LOADER}/compressed_tensors_wNa16.py"

LOADS: Mapping[str, str] = {
    "fp8": MODELOPT_LOADER,
    "fp8_block": "vllm 0.25.1 layers/quantization/fp8.py, weight_block_size",
    "int8_wo": PACKED_LOADER,
    "int8_sq": f"{COMPRESSED_LOADER}/compressed_tensors_w8a8_int8.py",
    "int4_gptq": PACKED_LOADER,
    "int4_rtn": PACKED_LOADER,
    "nvfp4": MODELOPT_LOADER,
}
"""The loading code of each scheme of `planner quantize`."""

PRIORITIES = "--scheduling-policy priority"


def no_pieces(_config: EngineConfig) -> tuple[int, ...]:
    """Return nothing: steps with prompts are replayed in pieces without being padded."""
    return ()


def single_tokens(_config: EngineConfig) -> int:
    """Return 1: a chunk takes what is left of a step, to the token."""
    return 1


SPEC = EngineSpec(
    traits=EngineTraits(
        name=NAME,
        memory_knob="gpu_memory_utilization",
        takes_share_of_whole_gpu=True,
        captured_batch_sizes=captured_batch_sizes,
        largest_graph_tokens=largest_graph_tokens,
        captured_pieces=no_pieces,
        pads_drafts=False,
        chunk_unit=single_tokens,
        reuses_partial_blocks=False,
        knows_block_size_effect=True,
    ),
    constants=SHIPPED_CONSTANTS / f"{NAME}.json",
    defaults={
        "max_batch_size": 256,
        "tokens_per_block": 16,
        "enable_chunked_prefill": True,
        "capacity_scheduler_policy": "RECOMPUTE",
        "cuda_graph_max_batch_size": 512,
        "cuda_graph_padding": True,
    },
    options=options_of,
    read_options=config_from_options,
    option_names=FLAGS,
    made_at_load={"fp8": "fp8_dynamic"},
    loads=LOADS,
    queue_orders={
        "SHORTEST_JOB_FIRST": f"{PRIORITIES}, with each request's expected output as its priority",
        "PRIORITY": PRIORITIES,
    },
    front_end_option="--api-server-count",
)
