"""TensorRT-LLM 1.2 on its PyTorch backend, as the registry hands it out."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.engine import EngineConfig
from cost_models.engine_traits import EngineTraits
from engines.base import SHIPPED_CONSTANTS, EngineSpec
from engines.trtllm.bench_limits import with_unstated_limits
from engines.trtllm.cuda_graphs import captured_batch_sizes, captured_pieces, largest_graph
from engines.trtllm.options import NAME, llm_api_options
from engines.trtllm.read_options import OPTION_PATHS, config_from_options
from engines.trtllm.scripts import FILES, launch_files, plan_files

OF_THE_CHECKPOINT = "quantization of the checkpoint"
"""The PyTorch backend reads it from there; no option sets it."""

MODELOPT_LOADER = (
    "tensorrt_llm/_torch/model_config.py load_modelopt_quant_config; docs quantization.md"
)
HF_LOADER = "tensorrt_llm/_torch/model_config.py load_hf_quant_config, quant_method fp8"

LOADS: Mapping[str, str] = {
    "fp8": MODELOPT_LOADER,
    "fp8_block": HF_LOADER,
    "int4_awq": MODELOPT_LOADER,
    "w4a8_awq": MODELOPT_LOADER,
    "nvfp4": MODELOPT_LOADER,
}
"""The loading code of each scheme of `planner quantize`."""


def chunk_unit(config: EngineConfig) -> int:
    """Return a block of the KV cache: chunks are rounded to blocks."""
    return min(config.tokens_per_block, config.max_num_tokens)


SPEC = EngineSpec(
    traits=EngineTraits(
        name=NAME,
        memory_knob="free_gpu_memory_fraction",
        takes_share_of_whole_gpu=False,
        captured_batch_sizes=captured_batch_sizes,
        largest_graph_tokens=largest_graph,
        captured_pieces=captured_pieces,
        pads_drafts=True,
        chunk_unit=chunk_unit,
        reuses_partial_blocks=True,
        knows_block_size_effect=False,
    ),
    constants=SHIPPED_CONSTANTS / f"{NAME}.json",
    options=llm_api_options,
    read_options=config_from_options,
    option_names={
        **{knob: path for path, knob in OPTION_PATHS.items()},
        "quantization": OF_THE_CHECKPOINT,
        "gpu_memory_utilization": "kv_cache_config.free_gpu_memory_fraction",
    },
    loads=LOADS,
    front_end_option="num_postprocess_workers",
    plan_file_names=FILES,
    plan_files=plan_files,
    launch_files=launch_files,
    with_unstated_limits=with_unstated_limits,
)
