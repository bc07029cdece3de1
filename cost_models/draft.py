"""The model that drafts tokens ahead of a target: its shape, its bytes, how it is deployed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.kv_cache import KvLayout, kv_layout
from cost_models.model import ModelSpec
from cost_models.weights import UNQUANTIZED_BYTES, weight_bytes

ON_HIDDEN_STATES = frozenset({"Eagle", "MTP"})
"""Schemes whose draft is one layer on top of the target's hidden states."""

EAGLE_VOCAB_SIZE = 32_000
"""Tokens that published EAGLE-3 heads draft from (`draft_vocab_size` of EAGLE3-LLaMA3.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The model that drafts, and how it is deployed beside the target."""

    model: ModelSpec
    config: EngineConfig
    decoding_type: str
    num_heads: int = 0
    """Medusa heads on the target itself; 0 of a model that makes passes of its own."""

    @property
    def weight_bytes(self) -> float:
        """Weights on one GPU; a layer on the target's states shares its embeddings and head."""
        hidden = self.model.hidden_size
        if self.num_heads:
            vocab_shard = self.model.vocab_size / self.config.attention_tensor_parallel_size
            return self.num_heads * (hidden + vocab_shard) * hidden * UNQUANTIZED_BYTES
        parts = weight_bytes(self.model, self.config).by_part
        if self.decoding_type == "DraftTarget":
            return sum(parts.values())
        shared = {"embedding", "extra"} | ({"lm_head"} if self.decoding_type == "MTP" else set())
        joined = 2 * hidden**2 * UNQUANTIZED_BYTES
        return sum(size for part, size in parts.items() if part not in shared) + joined

    @property
    def kv_layout(self) -> KvLayout:
        """What it caches for each token; heads cache nothing."""
        return KvLayout(pools=()) if self.num_heads else kv_layout(self.model, self.config)


def draft_of(config: EngineConfig, model: ModelSpec, draft_model: ModelSpec | None) -> Draft | None:
    """Return what drafts for a target, or None where no model does.

    Args:
        config: What is deployed, the target's scheme in it.
        model: The target.
        draft_model: The model that `speculative_model` names; other schemes derive theirs.

    Raises:
        ConfigError: The scheme needs a model and none is named.
    """
    plain = replace(config, decoding_type="", max_draft_len=0, speculative_model="")
    kind = config.decoding_type
    if kind in ON_HIDDEN_STATES:
        layer = replace(model.layer_groups[-1], count=1)
        one_layer = replace(model, layer_groups=(layer,), extra_parameters=0, mtp_layers=0)
        if kind == "Eagle":
            vocab_size = min(model.vocab_size, EAGLE_VOCAB_SIZE)
            one_layer = replace(one_layer, vocab_size=vocab_size, tie_word_embeddings=False)
            plain = replace(plain, quantization="bf16")
        return Draft(model=one_layer, config=plain, decoding_type=kind)
    if kind == "Medusa":
        return Draft(model=model, config=plain, decoding_type=kind, num_heads=config.max_draft_len)
    if kind != "DraftTarget":
        return None
    if draft_model is None:
        raise ConfigError(
            "decoding_type=DraftTarget drafts with another model", hint="give speculative_model"
        )
    plain = replace(plain, quantization=draft_model.checkpoint_quantization)
    if not draft_model.is_moe:
        plain = replace(plain, moe_expert_parallel_size=1)
    return Draft(model=draft_model, config=plain, decoding_type=kind)
