"""The shape of a language model: what its layers hold, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AttentionKind(StrEnum):
    """How a layer keeps its keys and values."""

    GQA = "gqa"
    """Multi-head, grouped-query or multi-query attention: K and V per KV head."""
    MLA = "mla"
    """Multi-head latent attention (DeepSeek): one latent vector per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One layer's attention."""

    kind: AttentionKind = AttentionKind.GQA
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of a query/key head. For MLA: qk_nope_head_dim + qk_rope_head_dim."""
    window_size: int = 0
    """Sliding window in tokens; 0 is full attention."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head (Qwen3, Gemma 3)."""
    has_sinks: bool = False
    """One learned sink logit per head (gpt-oss)."""
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """One layer's feed-forward part: dense when `num_experts` is 0."""

    inter_size: int
    """Width of the dense MLP, or of one expert."""
    gated: bool = True
    """SwiGLU-like: gate and up projections; False: one up projection."""
    bias: bool = False
    num_experts: int = 0
    top_k: int = 0
    """Experts per token."""
    shared_inter_size: int = 0
    """Total width of the experts that every token visits; 0: none."""
    shared_gate: bool = False
    """A scalar gate on the shared expert (Qwen2-MoE)."""
    router_bias: bool = False

    @property
    def is_moe(self) -> bool:
        """Whether tokens are routed to experts."""
        return self.num_experts > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of the same shape, in any position of the stack."""

    count: int
    attention: AttentionSpec
    mlp: MlpSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer."""

    name: str
    """Profile name, for example `llama-3.1-8b`."""
    hub_name: str
    """Where its checkpoint lives, for example `meta-llama/Llama-3.1-8B-Instruct`."""
    architecture: str
    """Hugging Face architecture, for example `LlamaForCausalLM`."""
    hidden_size: int
    vocab_size: int
    layer_groups: tuple[LayerGroup, ...]
    tie_word_embeddings: bool
    max_position_embeddings: int
    norms_per_layer: int = 2
    """Full-width norms in a layer, QK norms not counted (Gemma 3 has 4)."""
    checkpoint_quantization: str = "bf16"
    """Precision in which the checkpoint is published (`bf16`, `fp8_block`, `w4a16_mxfp4`)."""
    extra_parameters: int = 0
    """Parameters outside the decoder that an engine loads too (a vision tower)."""
    mtp_layers: int = 0
    """Multi-token-prediction layers in the checkpoint, unused without speculation."""

    @property
    def num_layers(self) -> int:
        """Decoder layers in all."""
        return sum(group.count for group in self.layer_groups)

    @property
    def is_moe(self) -> bool:
        """Whether any layer routes tokens to experts."""
        return any(group.mlp.is_moe for group in self.layer_groups)

    @property
    def uses_mla(self) -> bool:
        """Whether any layer keeps latent KV."""
        return any(g.attention.kind is AttentionKind.MLA for g in self.layer_groups)

    @property
    def num_heads(self) -> int:
        """Query heads of the widest layer."""
        return max(group.attention.num_heads for group in self.layer_groups)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the widest layer."""
        return max(group.attention.num_kv_heads for group in self.layer_groups)
