"""Free bytes to KV blocks to tokens to sequences, by the engine's own rule, in one function.

The estimator, the simulator's block pool, the search's feasibility test and the
breakdown that a user sees all read the `MemoryPlan` made here. Every quantity broadcasts
over arrays of knobs, so that a search divides memory for thousands of configurations at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.draft import Draft
from cost_models.engine import EngineConfig
from cost_models.engine_traits import EngineTraits
from cost_models.gpu import GpuSpec
from cost_models.kv_cache import KvLayout, joined, kv_layout
from cost_models.model import AttentionKind, LayerGroup, ModelSpec
from cost_models.weights import weight_bytes

FloatArray = NDArray[np.float64]

ACTIVATION_ELEMENT_BYTES = 2
"""Activations are kept in BF16 between operators, whatever the GEMMs compute in."""

LOGIT_BYTES = 4
"""Logits are converted to FP32 before sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConstants:
    """What an engine keeps on a GPU beside weights, activations and KV cache.

    Calibrated from the KV capacity that engines report; see `profiles/calibrations`.
    """

    runtime_bytes: float
    """CUDA context, library workspaces and the engine's own buffers on one GPU."""
    driver_fraction: float
    """Share of the GPU's memory that the driver withholds from programs."""
    communication_bytes: float
    """Buffers of NCCL and the custom all-reduce as soon as TP or PP exceeds 1."""
    communication_bytes_per_doubling: float
    """The same for each doubling of the ranks."""
    activation_factor: float
    """Measured activation peak over the live set computed here."""
    graph_bytes_per_layer: float
    """CUDA-graph memory for one captured batch size, per decoder layer."""
    logits_rows_limit: float
    """Rows of logits alive in the profiling step; the batch size caps it too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryKnobs:
    """The limits that decide how memory is divided. Arrays broadcast over configurations."""

    max_batch_size: ArrayLike
    max_num_tokens: ArrayLike
    max_seq_len: ArrayLike
    tokens_per_block: ArrayLike
    kv_fraction: ArrayLike
    """The knob that the engine's traits name."""
    kv_cache_max_tokens: ArrayLike
    """Pins the capacity of one rank; 0 lets the fraction decide."""
    num_cuda_graphs: ArrayLike

    @classmethod
    def of(cls, config: EngineConfig, *, model: ModelSpec, engine: EngineTraits) -> MemoryKnobs:
        """Return the knobs of one configuration."""
        return cls(
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.max_num_tokens,
            max_seq_len=config.max_seq_len or model.max_position_embeddings,
            tokens_per_block=config.tokens_per_block,
            kv_fraction=getattr(config, engine.memory_knob),
            kv_cache_max_tokens=config.kv_cache_max_tokens,
            num_cuda_graphs=len(engine.captured_batch_sizes(config)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the bytes of one GPU go, for the rank that holds most; one element a configuration."""

    layout: KvLayout
    total_bytes: float
    weight_bytes_per_gpu: float
    communication_bytes_per_gpu: float
    runtime_bytes_per_gpu: float
    """CUDA context, workspaces and what the driver withholds."""
    activation_bytes_per_gpu: FloatArray
    kv_cache_bytes_per_gpu: FloatArray
    cuda_graph_bytes_per_gpu: FloatArray
    """Captured after the KV cache is allocated, out of what it left."""
    reserved_bytes_per_gpu: FloatArray
    """What the fraction leaves outside the KV cache, the graphs included."""
    kv_cache_tokens: FloatArray
    """Tokens that a replica caches, over its attention-DP ranks."""
    kv_cache_blocks: FloatArray
    max_sequences: FloatArray
    """Sequences of `max_seq_len` tokens that a replica's cache holds at once."""
    shortfall_bytes: FloatArray
    """Bytes by which the configuration does not fit; 0 when it fits."""

    @property
    def free_bytes_per_gpu(self) -> FloatArray:
        """What is left over after everything, the graphs included."""
        return self.reserved_bytes_per_gpu - self.cuda_graph_bytes_per_gpu

    @property
    def fits(self) -> NDArray[np.bool_]:
        """Whether weights, activations, graphs and at least one sequence fit."""
        return self.shortfall_bytes <= 0

    @property
    def binding(self) -> str:
        """What a configuration that does not fit runs out of (one configuration only)."""
        if self.fits:
            return ""
        if self.reserved_bytes_per_gpu + self.kv_cache_bytes_per_gpu <= 0:
            return "weights and activations"
        if self.max_sequences < 1:
            return "KV cache for one sequence of max_seq_len"
        return "CUDA graphs"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """How one GPU's memory is divided, for one model under one way to split and store it.

    Of `config` only precision and parallel sizes matter; the other knobs come as arrays.
    """

    model: ModelSpec
    config: EngineConfig
    gpu: GpuSpec
    engine: EngineTraits
    constants: MemoryConstants
    draft: Draft | None = None
    """A model that drafts beside it: its weights and its cache lie on the same GPUs."""

    def plan(self, knobs: MemoryKnobs) -> MemoryPlan:
        """Return how memory is divided under each set of knobs.

        An engine gives the KV cache its share of what is free after weights and the
        activation peak, or what is left of its share of the whole GPU.
        """
        layout = self._kv_layout()
        weights = self._weight_bytes()
        activations = self._activation_bytes(knobs)
        communication = self._communication_bytes()
        runtime = (
            self.constants.runtime_bytes + self.constants.driver_fraction * self.gpu.memory_bytes
        )
        unfilled = self.gpu.memory_bytes - weights - activations - communication - runtime
        graphs = self._cuda_graph_bytes(knobs)
        wanted = self._kv_cache_bytes(unfilled, knobs)
        blocks = self._blocks(wanted, knobs, layout)
        block_tokens = np.asarray(knobs.tokens_per_block, dtype=np.float64)
        kv_bytes = blocks * layout.bytes_per_token * block_tokens
        one_sequence = layout.sequence_bytes(knobs.max_seq_len, knobs.tokens_per_block)
        ranks = self.config.attention_dp_ranks
        return MemoryPlan(
            layout=layout,
            total_bytes=self.gpu.memory_bytes,
            weight_bytes_per_gpu=weights,
            communication_bytes_per_gpu=communication,
            runtime_bytes_per_gpu=runtime,
            activation_bytes_per_gpu=activations,
            kv_cache_bytes_per_gpu=kv_bytes,
            cuda_graph_bytes_per_gpu=graphs,
            reserved_bytes_per_gpu=unfilled - kv_bytes,
            kv_cache_tokens=blocks * block_tokens * ranks,
            kv_cache_blocks=blocks * ranks,
            max_sequences=np.floor(kv_bytes / one_sequence) * ranks,
            shortfall_bytes=_shortfall(unfilled, kv_bytes, graphs, one_sequence),
        )

    def _kv_layout(self) -> KvLayout:
        own = kv_layout(self.model, self.config)
        return joined([own, self.draft.kv_layout]) if self.draft else own

    def _weight_bytes(self) -> float:
        drafting = self.draft.weight_bytes if self.draft else 0.0
        return weight_bytes(self.model, self.config).total + drafting

    def _activation_bytes(self, knobs: MemoryKnobs) -> FloatArray:
        """Activation peak at `max_num_tokens`, and the logits of the rows that are sampled."""
        per_token = activation_bytes_per_token(self.model, self.config)
        tokens = np.asarray(knobs.max_num_tokens, dtype=np.float64)
        sampled = np.asarray(knobs.max_batch_size) * (1 + self.config.max_draft_len)
        rows = np.minimum(np.minimum(sampled, tokens), self.constants.logits_rows_limit)
        logits = rows * self.model.vocab_size * LOGIT_BYTES
        peak = tokens * per_token * self.constants.activation_factor + logits
        return np.asarray(peak, dtype=np.float64)

    def _communication_bytes(self) -> float:
        ranks = self.config.num_gpus
        if ranks == 1:
            return 0.0
        per_doubling = self.constants.communication_bytes_per_doubling
        return self.constants.communication_bytes + per_doubling * math.log2(ranks)

    def _cuda_graph_bytes(self, knobs: MemoryKnobs) -> FloatArray:
        layers = -(-self.model.num_layers // self.config.pipeline_parallel_size)
        count = np.asarray(knobs.num_cuda_graphs, dtype=np.float64)
        return count * layers * self.constants.graph_bytes_per_layer

    def _kv_cache_bytes(self, unfilled: FloatArray, knobs: MemoryKnobs) -> FloatArray:
        share: FloatArray = np.asarray(knobs.kv_fraction, dtype=np.float64)
        if self.engine.takes_share_of_whole_gpu:
            return unfilled - (1.0 - share) * self.gpu.memory_bytes
        return unfilled * share

    def _blocks(self, kv_bytes: FloatArray, knobs: MemoryKnobs, layout: KvLayout) -> FloatArray:
        per_block = layout.bytes_per_token * np.asarray(knobs.tokens_per_block, np.float64)
        blocks = np.floor(np.maximum(kv_bytes, 0.0) / per_block)
        pinned = np.ceil(np.asarray(knobs.kv_cache_max_tokens) / knobs.tokens_per_block)
        return np.where(pinned > 0, np.minimum(blocks, pinned), blocks)


def plan_memory(
    model: ModelSpec,
    config: EngineConfig,
    *,
    gpu: GpuSpec,
    engine: EngineTraits,
    constants: MemoryConstants,
    draft: Draft | None = None,
) -> MemoryPlan:
    """Return how one configuration divides a GPU's memory."""
    memory = MemoryModel(
        model=model, config=config, gpu=gpu, engine=engine, constants=constants, draft=draft
    )
    return memory.plan(MemoryKnobs.of(config, model=model, engine=engine))


def activation_bytes_per_token(model: ModelSpec, config: EngineConfig) -> float:
    """Live set of the widest layer for one token, in bytes on one rank.

    Two full-width tensors (residual and normalised input) and the widest
    intermediate of attention or MLP, gate and up together with their product.
    """
    elements = max(_layer_activation_elements(model, g, config) for g in model.layer_groups)
    return elements * ACTIVATION_ELEMENT_BYTES


def _layer_activation_elements(model: ModelSpec, group: LayerGroup, config: EngineConfig) -> float:
    attention, mlp = group.attention, group.mlp
    heads = attention.num_heads + 2 * attention.num_kv_heads
    if attention.kind is AttentionKind.MLA:
        heads = 3 * attention.num_heads
    attention_width = 2 * heads * attention.head_dim / config.attention_tensor_parallel_size
    tp = config.tensor_parallel_size
    inter = mlp.inter_size
    if mlp.is_moe:
        # Every token is copied to its experts: input, intermediate and output rows.
        routed = mlp.top_k * (2 * model.hidden_size + 3 * inter / config.moe_tensor_parallel_size)
        mlp_width = routed / config.moe_expert_parallel_size + 3 * mlp.shared_inter_size / tp
    else:
        mlp_width = (3 if mlp.gated else 2) * inter / tp
    return 2 * model.hidden_size + max(attention_width, mlp_width)


def _shortfall(
    unfilled: FloatArray, kv_bytes: FloatArray, graphs: FloatArray, one_sequence: FloatArray
) -> FloatArray:
    """Bytes missing for weights, then for one sequence, then for the graphs beside the KV cache."""
    weights = np.maximum(-unfilled, 0.0)
    sequence = np.maximum(one_sequence - kv_bytes, 0.0)
    remaining_graphs = np.maximum(graphs - (unfilled - kv_bytes), 0.0)
    return np.where(
        unfilled <= 0, weights + one_sequence + graphs, np.maximum(sequence, remaining_graphs)
    )
