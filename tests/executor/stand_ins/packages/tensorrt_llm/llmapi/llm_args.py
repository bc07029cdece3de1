"""Options of TensorRT-LLM 1.2 by name, type and value; unknown ones are refused, as there."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KvCacheConfig(_Strict):
    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float = 0.9
    tokens_per_block: int = 32
    max_tokens: int | None = None
    dtype: str = "auto"


class SchedulerConfig(_Strict):
    capacity_scheduler_policy: Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"]
    context_chunking_policy: Literal["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"] | None = None


class CudaGraphConfig(_Strict):
    enable_padding: bool = False
    max_batch_size: int = 0


class MoeConfig(_Strict):
    backend: Literal["CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON"]


class TorchLlmArgs(_Strict):
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    moe_expert_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    enable_attention_dp: bool = False
    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    enable_chunked_prefill: bool = False
    disable_overlap_scheduler: bool = False
    stream_interval: int = 1
    allreduce_strategy: str = "AUTO"
    load_format: Literal["AUTO", "DUMMY"] = "AUTO"
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    scheduler_config: SchedulerConfig | None = None
    cuda_graph_config: CudaGraphConfig | None = None
    moe_config: MoeConfig | None = None


class EngineKvCacheConfig(_Strict):
    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float = 0.9
    max_tokens: int | None = None
    dtype: Literal["auto"] = "auto"


class ExtendedRuntimePerfKnobConfig(_Strict):
    multi_block_mode: bool = True
    enable_context_fmha_fp32_acc: bool = False
    cuda_graph_mode: bool = False
    cuda_graph_cache_size: int = 0


class TrtLlmArgs(_Strict):
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    enable_chunked_prefill: bool = False
    kv_cache_config: EngineKvCacheConfig = EngineKvCacheConfig()
    scheduler_config: SchedulerConfig | None = None
    extended_runtime_perf_knob_config: ExtendedRuntimePerfKnobConfig | None = None
