"""Reads a Hugging Face `config.json` into a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from cost_models.errors import ConfigError, UnsupportedModelError
from cost_models.model import AttentionKind, AttentionSpec, LayerGroup, MlpSpec, ModelSpec

Config = Mapping[str, Any]

LARGEST_COUNT = 10_000_000
"""No size in a config is larger; beyond it, the file is damaged."""


def model_from_config(config: Config, *, name: str, hub_name: str = "") -> ModelSpec:
    """Return the shape that a config describes.

    Raises:
        UnsupportedModelError: The architecture is not understood.
        ConfigError: A size is missing, negative or not a whole number.
    """
    architecture = str((config.get("architectures") or ["?"])[0])
    if architecture not in READERS:
        raise UnsupportedModelError(
            f"{name}: architecture {architecture!r} is not understood",
            hint=f"understood: {', '.join(sorted(READERS))}",
        )
    text = config.get("text_config", config)
    reader = READERS[architecture]
    layers = [reader(text, index) for index in range(_size(text, "num_hidden_layers", name))]
    groups = tuple(
        LayerGroup(count=len(list(same)), attention=layer[0], mlp=layer[1])
        for layer, same in groupby(sorted(layers, key=layers.index))
    )
    return ModelSpec(
        name=name,
        hub_name=hub_name or name,
        architecture=architecture,
        hidden_size=_size(text, "hidden_size", name),
        vocab_size=_size({"vocab_size": 262208, **text}, "vocab_size", name),
        layer_groups=groups,
        tie_word_embeddings=_tied(config, architecture),
        max_position_embeddings=_size(
            {"max_position_embeddings": 131072, **text}, "max_position_embeddings", name
        ),
        norms_per_layer=4 if architecture.startswith(("Gemma2", "Gemma3")) else 2,
        checkpoint_quantization=_checkpoint_quantization(config),
        extra_parameters=_vision_parameters(config, text),
        mtp_layers=int(text.get("num_nextn_predict_layers") or 0),
    )


def _dense(config: Config, index: int) -> tuple[AttentionSpec, MlpSpec]:
    return _attention(config, index), _mlp(config)


def _mixtral(config: Config, index: int) -> tuple[AttentionSpec, MlpSpec]:
    mlp = MlpSpec(
        inter_size=_size(config, "intermediate_size"),
        num_experts=_size(config, "num_local_experts"),
        top_k=_size(config, "num_experts_per_tok"),
    )
    return _attention(config, index), mlp


def _qwen_moe(config: Config, index: int) -> tuple[AttentionSpec, MlpSpec]:
    sparse_step = int(config.get("decoder_sparse_step") or 1)
    dense = index in (config.get("mlp_only_layers") or []) or (index + 1) % sparse_step
    if dense:
        return _dense(config, index)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    mlp = MlpSpec(
        inter_size=_size(config, "moe_intermediate_size"),
        num_experts=_size(config, "num_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        shared_inter_size=shared,
        shared_gate=shared > 0,
    )
    return _attention(config, index), mlp


def _gpt_oss(config: Config, index: int) -> tuple[AttentionSpec, MlpSpec]:
    attention = replace(_attention(config, index), qkv_bias=True, output_bias=True, has_sinks=True)
    mlp = MlpSpec(
        inter_size=_size(config, "intermediate_size"),
        bias=True,
        num_experts=_size(config, "num_local_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        router_bias=True,
    )
    return attention, mlp


def _deepseek(config: Config, index: int) -> tuple[AttentionSpec, MlpSpec]:
    nope, rope = _size(config, "qk_nope_head_dim"), _size(config, "qk_rope_head_dim")
    attention = AttentionSpec(
        kind=AttentionKind.MLA,
        num_heads=_size(config, "num_attention_heads"),
        num_kv_heads=1,
        head_dim=nope + rope,
        q_lora_rank=int(config.get("q_lora_rank") or 0),
        kv_lora_rank=_size(config, "kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=_size(config, "v_head_dim"),
    )
    if index < int(config.get("first_k_dense_replace") or 0):
        return attention, _mlp(config)
    inter = _size(config, "moe_intermediate_size")
    mlp = MlpSpec(
        inter_size=inter,
        num_experts=_size(config, "n_routed_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        shared_inter_size=inter * int(config.get("n_shared_experts") or 0),
        # e_score_correction_bias: one value per expert, in V3 only.
        router_bias=config.get("topk_method") == "noaux_tc",
    )
    return attention, mlp


READERS: Mapping[str, Callable[[Config, int], tuple[AttentionSpec, MlpSpec]]] = {
    "LlamaForCausalLM": _dense,
    "MistralForCausalLM": _dense,
    "Qwen2ForCausalLM": _dense,
    "Qwen3ForCausalLM": _dense,
    "Phi3ForCausalLM": _dense,
    "Gemma2ForCausalLM": _dense,
    "Gemma3ForCausalLM": _dense,
    "Gemma3ForConditionalGeneration": _dense,
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen_moe,
    "Qwen3MoeForCausalLM": _qwen_moe,
    "GptOssForCausalLM": _gpt_oss,
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
}
"""How each architecture describes layer `index`."""


def _attention(config: Config, index: int) -> AttentionSpec:
    model_type = str(config.get("model_type", ""))
    heads = _size({"num_attention_heads": 8, **config}, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or _size(config, "hidden_size") // heads)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window_size=_window(config, index),
        qkv_bias=bool(config.get("attention_bias")) or model_type in ("qwen2", "qwen2_moe"),
        output_bias=bool(config.get("attention_bias")) and model_type == "llama",
        qk_norm=model_type.startswith(("qwen3", "gemma3")),
    )


def _window(config: Config, index: int) -> int:
    """Sliding window of a layer; 0 is full attention."""
    window = int(config.get("sliding_window") or 0)
    if not window or config.get("use_sliding_window") is False:
        return 0
    kinds = config.get("layer_types")
    if kinds:
        return window if kinds[index] == "sliding_attention" else 0
    # Gemma 3: five local layers, then a global one. Gemma 2: every other layer is local.
    pattern = int(config.get("sliding_window_pattern") or 0)
    if str(config.get("model_type", "")).startswith("gemma3"):
        pattern = pattern or 6
    if config.get("model_type") == "gemma2":
        pattern = 2
    return 0 if pattern and (index + 1) % pattern == 0 else window


def _mlp(config: Config) -> MlpSpec:
    return MlpSpec(inter_size=_size(config, "intermediate_size"), bias=bool(config.get("mlp_bias")))


def _tied(config: Config, architecture: str) -> bool:
    default = architecture.startswith("Gemma")
    value = config.get(
        "tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", default)
    )
    return bool(value)


def _checkpoint_quantization(config: Config) -> str:
    """Precision that the published weights have."""
    quantized = config.get("quantization_config") or {}
    method = str(quantized.get("quant_method", ""))
    if method == "fp8":
        return "fp8_block" if quantized.get("weight_block_size") else "fp8"
    return {"mxfp4": "w4a16_mxfp4", "awq": "w4a16_awq", "gptq": "w4a16_gptq"}.get(method, "bf16")


def _vision_parameters(config: Config, text: Config) -> int:
    """SigLIP tower and projector of a multimodal checkpoint (Gemma 3)."""
    vision = config.get("vision_config")
    if not vision:
        return 0
    width, inter = _size(vision, "hidden_size"), _size(vision, "intermediate_size")
    patch, image = _size(vision, "patch_size"), _size(vision, "image_size")
    layer = 4 * width * (width + 1) + 2 * width * inter + width + inter + 4 * width
    patches = width * (3 * patch * patch + 1) + (image // patch) ** 2 * width
    projector = width * _size(text, "hidden_size") + width
    return _size(vision, "num_hidden_layers") * layer + patches + 2 * width + projector


def _size(config: Config, key: str, name: str = "") -> int:
    """Return a positive whole number of the config."""
    value = config.get(key)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value is None or not 0 < value <= LARGEST_COUNT:
        where = f"{name}: " if name else ""
        raise ConfigError(
            f"{where}config.json has {key}={value!r}", hint="it must be a positive whole number"
        )
    return int(value)
