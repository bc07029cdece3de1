"""One way to run a model: the knobs of an engine, in TensorRT-LLM's own names."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine of one server is told; `cost_models.deployment` says how many there are.

    Defaults are those of `trtllm-serve` 1.2 on its PyTorch backend.
    """

    quantization: str = "bf16"
    kv_cache_dtype: str = "bf16"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    moe_expert_parallel_size: int = 1
    """Ranks over which whole experts are spread; the rest of TP splits each expert."""
    enable_attention_dp: bool = False
    """Attention is replicated and each rank serves its own requests."""
    moe_backend: str = "CUTLASS"
    max_batch_size: int = 2048
    """Sequences in one iteration (per rank under attention DP)."""
    max_num_tokens: int = 8192
    """Tokens in one iteration (per rank under attention DP)."""
    max_seq_len: int = 0
    """Longest prompt plus output; 0 takes the model's own limit."""
    tokens_per_block: int = 32
    free_gpu_memory_fraction: float = 0.9
    """TensorRT-LLM: share of what is free after weights and activations."""
    gpu_memory_utilization: float = 0.9
    """vLLM: share of the whole GPU that the engine may use."""
    kv_cache_max_tokens: int = 0
    """Pins the KV capacity; 0 lets the fraction decide."""
    enable_chunked_prefill: bool = False
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    """Whether a prefix that ends inside a block is copied from there."""
    host_cache_size: int = 0
    """Bytes of host memory that keep evicted prefix blocks."""
    capacity_scheduler_policy: str = "GUARANTEED_NO_EVICT"
    queue_order: str = "FIRST_COME_FIRST_SERVED"
    """Who is admitted next; engines offer few of those that can be predicted."""
    context_chunking_policy: str = "FIRST_COME_FIRST_SERVED"
    """Whether first prompts take all they can of a step, or all advance alike."""
    cuda_graph_max_batch_size: int = 128
    """Largest decode batch captured in a CUDA graph; 0 is eager."""
    cuda_graph_padding: bool = False
    enable_piecewise_cuda_graph: bool = False
    """TensorRT-LLM: `torch_compile_config` with graphs of steps with prompts, piece by piece.

    They are launched faster, but padded to captured numbers of tokens.
    """
    stream_interval: int = 1
    disable_overlap_scheduler: bool = False
    allreduce_strategy: str = "AUTO"
    decoding_type: str = ""
    """Who drafts tokens ahead: `NGram`, `DraftTarget`, `Eagle`, `MTP`, `Medusa`; empty: nobody."""
    max_draft_len: int = 0
    """Draft tokens that one step verifies behind each sequence's own."""
    speculative_model: str = ""
    """The draft's checkpoint: a profile, hub name or path; n-grams and MTP need none."""
    max_matching_ngram_size: int = 2
    """Longest run of tokens that n-gram drafting looks up."""

    @property
    def speculates(self) -> bool:
        """Whether steps verify drafts."""
        return bool(self.decoding_type) and self.max_draft_len > 0

    @property
    def num_gpus(self) -> int:
        """GPUs of the server: those of one replica of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def moe_tensor_parallel_size(self) -> int:
        """Ranks over which each expert is split."""
        return self.tensor_parallel_size // self.moe_expert_parallel_size

    @property
    def attention_tensor_parallel_size(self) -> int:
        """Ranks over which attention heads are split."""
        return 1 if self.enable_attention_dp else self.tensor_parallel_size

    @property
    def attention_dp_ranks(self) -> int:
        """Ranks that each have a batch and a KV cache of their own."""
        return self.tensor_parallel_size if self.enable_attention_dp else 1

    @property
    def num_instances(self) -> int:
        """Scheduler instances: batches that run side by side, in step; ranks x pipeline stages."""
        return self.attention_dp_ranks * self.pipeline_parallel_size


KNOBS: tuple[str, ...] = tuple(field.name for field in fields(EngineConfig))
"""Every knob of an engine."""
