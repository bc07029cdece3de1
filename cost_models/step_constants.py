"""The constants of an engine's step that no operator table holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FP8_NARROW_ROWS = 16
"""Rows up to which vLLM's FP8 GEMM on Hopper takes its narrowest tile."""

FP8_TILE_ROWS = (64, 128)
"""Rows of the next two tiles of that GEMM, to which fewer are padded."""

LONG_CONTEXT_TOKENS = 4096
"""Cached tokens of a sequence at which half of a long context's excess is felt."""

OPERATOR_FAMILIES = (
    "gemm", "attention_decode", "attention_prefill", "moe", "elementwise", "lm_head",
    "communication", "gaps",
)  # fmt: skip
"""What `family_scale` may scale: all of a step but the host's work and its launches."""

LAUNCH_CONSTANTS = (
    "eager_layer_s", "eager_layer_tp_s", "eager_sequence_s", "eager_layer_fp8_cache_s",
    "pieces_launch_share",
)  # fmt: skip
"""What only the launch of steps outside whole CUDA graphs feels."""

EFFICIENCY_BLOCK_TOKENS = 16
"""Block size for which `attention_decode_fp8_bytes_per_flop` is meant, vLLM's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants:
    """Host time, gaps and floors of one engine; fitted on serving runs."""

    host_s: float
    """Per step: scheduling, sampling and their launch, not hidden by the overlap scheduler."""
    host_per_sequence_s: float
    """Per step and running sequence."""
    layer_gap_s: float
    """Per layer: gaps between kernels inside a CUDA graph."""
    tp_gap_s: float
    """Per layer and doubling of TP: ranks wait for the slowest before each all-reduce."""
    eager_layer_s: float
    """Per layer: launching the kernels of a step that runs without a CUDA graph."""
    eager_layer_tp_s: float
    """The same in addition when TP exceeds 1."""
    eager_norm: float
    """Order of the p-norm that joins GPU time and the launch floor of eager steps."""
    elementwise_efficiency: float
    """Share of HBM bandwidth that norms and activations reach."""
    elementwise_launch_s: float
    """Per fused element-wise kernel."""
    eager_sequence_s: float = 0.0
    """Host time per decoding sequence of an eager step, on top of the launch."""
    eager_layer_fp8_cache_s: float = 0.0
    """Per layer of an eager step: launching what an FP8 cache needs in addition.

    Steps that are captured piece by piece do not feel it: the query is quantized inside a piece.
    """
    piecewise_max_tokens: int = 0
    """Tokens of the largest step with prompts whose layers vLLM replays in pieces.

    No more than its largest graph, which follows the batch limit; 0 where the engine captures
    pieces on request alone (`enable_piecewise_cuda_graph` of TensorRT-LLM).
    """
    pieces_launch_share: float = 1.0
    """Share of an eager layer's launch that stays where all but attention is replayed, at most 1.

    Attention's operator stays eager, with much of the host's work. Fitted for vLLM; how much it is
    of TensorRT-LLM nobody has published: a round prior.
    """
    attention_decode_efficiency: float = 0.0
    """Share of HBM bandwidth at which the engine's own decode kernel reads the cache.

    0 where the operator table is the engine's own.
    """
    attention_decode_fp8_bytes_per_flop: float = 0.0
    """Bytes of an FP8 cache that the kernel converts in the time of one BF16 operation.

    Its rate hangs on the multiprocessors, as long as the memory is fast enough: an H200 reads
    such a cache no faster than an H100.
    """
    attention_decode_launch_s: float = 0.0
    """Fixed time of that kernel."""
    attention_decode_fp8_launch_s: float = 0.0
    """The same for an FP8 cache, the quantization of the query included."""
    attention_decode_long_excess: float = 0.0
    """Share by which very long contexts take longer than their bytes.

    They are split over thread blocks: partial results are merged, and the splits differ in length.
    """
    attention_decode_fp8_long_excess: float = 0.0
    """The same for an FP8 cache."""
    attention_decode_fp8_block_gain: float = 0.0
    """Share by which it reads an FP8 cache faster for each doubling of `tokens_per_block`.

    Over blocks of `EFFICIENCY_BLOCK_TOKENS`; a BF16 cache is read alike at every size
    (`python -m tests.bench.block_size_attention`).
    """
    gemm_row_excess: float = 0.0
    """Share by which the rows of a GEMM beyond the first take longer than in the table.

    Tables are measured in short bursts; a server runs into the power limit, and the clock of
    what is bound by arithmetic falls, while what reads weights does not feel it.
    """
    fp8_gemm_row_excess: float = 0.0
    """The same in addition for FP8, where the kernel is the engine's own."""
    fp8_wide_gemm_s: float = 0.0
    """What the engine's own FP8 GEMM takes over the table's, above `FP8_NARROW_ROWS` rows.

    0 where the table is the engine's own; else it also stands for run-time activation scales.
    """
    host_floor_s: float = 0.0
    """Per step: what the host does while the GPU computes; it shows where the GPU is faster."""
    host_floor_per_sequence_s: float = 0.0
    """The same per decoding sequence: the scheduler goes through all that run, one by one."""
    synchronous_host_s: float = 0.0
    """Per step: scheduling, sampling and bookkeeping that a scheme which is not scheduled ahead
    leaves bare, since the next step waits for the drafts of this one."""
    synchronous_host_per_sequence_s: float = 0.0
    """The same per running sequence."""
    ngram_token_s: float = 0.0
    """Per cached token: searching the context for the n-gram that a draft follows.

    vLLM scans every sequence from its first token in each step, in one thread
    (`python -m tests.bench.ngram_proposer`); 0 where an index is kept, as TensorRT-LLM does.
    """
    judged_logit_bytes: float = 0.0
    """Traffic of one logit of a draft token: gathered, widened, copied, compared."""
    draft_pass_s: float = 0.0
    """Per pass of a draft model: preparing it and choosing its tokens, which no operator is."""
    draft_layer_s: float = 0.0
    """Per layer: launching a pass of a draft model; 0 where a graph of it is replayed."""
    drafting_layer_pass_s: float = 0.0
    """Per pass of a layer on the target's states (EAGLE, MTP), where the host replays each."""
    piecewise_decode_layer_s: float = 0.0
    """Per layer: launching a decode step whose layers are captured in graphs piece by piece."""
    family_scale: Mapping[str, float] = field(default_factory=dict)
    """Engine's operator time over the table's, by family; 1 where absent."""
