"""How many parameters a model has, and how many bytes they take on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.kv_cache import kv_heads_per_rank
from cost_models.model import AttentionKind, AttentionSpec, LayerGroup, MlpSpec, ModelSpec
from cost_models.precision import Quantization, quantization

UNQUANTIZED_BYTES = 2
"""Embeddings, head, norms, biases and routers stay in BF16."""

CHANNEL_SCALE_BYTES = 2
"""One scale per output channel of an integer weight-only matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A linear layer's weight on one rank, and how often a layer has it."""

    part: str
    """`attention`, `mlp`, `experts`, `shared_experts` or `router`."""
    rows: float
    """Output features."""
    columns: float
    """Input features."""
    count: float = 1.0
    bias: bool = False

    @property
    def parameters(self) -> float:
        """Weights and biases."""
        return self.count * self.rows * (self.columns + (1 if self.bias else 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Weights of one GPU, by part, on the pipeline stage that holds most."""

    by_part: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.by_part.values())


def parameter_count(model: ModelSpec) -> int:
    """Return the parameters of the published checkpoint, multi-token-prediction layers left out."""
    single = EngineConfig()
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    layers = sum(
        group.count
        * (
            sum(matrix.parameters for matrix in layer_matrices(model, group, single))
            + _vector_parameters(model, group)
        )
        for group in model.layer_groups
    )
    return round(embeddings + layers + model.hidden_size + model.extra_parameters)


def weight_bytes(model: ModelSpec, config: EngineConfig) -> WeightBytes:
    """Return the weights on one GPU of the fullest pipeline stage.

    Layers are spread evenly over stages; the first also holds the embedding, the last
    the head. Embedding and head are split over TP by vocabulary, and whole under
    attention DP.

    Raises:
        ConfigError: A parallel size does not divide what it splits.
    """
    check_divides(model, config)
    row = quantization(config.quantization)
    parts: dict[str, float] = {}
    for group in model.layer_groups:
        for matrix in layer_matrices(model, group, config):
            size = group.count * _matrix_bytes(matrix, row)
            parts[matrix.part] = parts.get(matrix.part, 0.0) + size
        vectors = group.count * _vector_parameters(model, group) * UNQUANTIZED_BYTES
        parts["norms"] = parts.get("norms", 0.0) + vectors
    stages = config.pipeline_parallel_size
    fullest = -(-model.num_layers // stages) / model.num_layers
    parts = {part: size * fullest for part, size in parts.items()}
    vocabulary = model.vocab_size * model.hidden_size * UNQUANTIZED_BYTES
    vocabulary_shard = vocabulary / config.attention_tensor_parallel_size
    parts["embedding"] = vocabulary_shard
    if not model.tie_word_embeddings and stages == 1:
        parts["lm_head"] = vocabulary_shard
    parts["extra"] = model.extra_parameters * UNQUANTIZED_BYTES
    return WeightBytes(by_part=parts)


def layer_matrices(model: ModelSpec, group: LayerGroup, config: EngineConfig) -> Iterator[Matrix]:
    """Yield the linear layers of one decoder layer as one rank holds them."""
    attention_tp = config.attention_tensor_parallel_size
    if group.attention.kind is AttentionKind.MLA:
        yield from _mla_matrices(model, group.attention, attention_tp)
    else:
        yield from _gqa_matrices(model, group.attention, attention_tp)
    if group.mlp.is_moe:
        yield from _moe_matrices(model, group.mlp, config)
    else:
        yield from _mlp_matrices(model, group.mlp, group.mlp.inter_size / attention_tp, "mlp")


def check_divides(model: ModelSpec, config: EngineConfig) -> None:
    """Refuse parallel sizes that do not divide heads, experts or layers.

    Raises:
        ConfigError: With the size and what it should divide.
    """
    tp, ep = config.tensor_parallel_size, config.moe_expert_parallel_size
    heads = model.num_heads
    if heads % config.attention_tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size={tp} does not divide the {heads} heads of {model.name}",
            hint=f"accepted: {', '.join(str(i) for i in (1, 2, 4, 8) if heads % i == 0)}",
        )
    if tp % ep:
        raise ConfigError(
            f"moe_expert_parallel_size={ep} does not divide tensor_parallel_size={tp}"
        )
    if config.pipeline_parallel_size > model.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={config.pipeline_parallel_size} exceeds the "
            f"{model.num_layers} layers of {model.name}"
        )
    for group in model.layer_groups:
        if group.mlp.is_moe and group.mlp.num_experts % ep:
            raise ConfigError(
                f"moe_expert_parallel_size={ep} does not divide "
                f"{group.mlp.num_experts} experts of {model.name}"
            )


def _gqa_matrices(model: ModelSpec, attention: AttentionSpec, tp: int) -> Iterator[Matrix]:
    heads = attention.num_heads / tp
    kv_heads = kv_heads_per_rank(attention, tp)
    width = attention.head_dim
    hidden = model.hidden_size
    qkv = (heads + 2 * kv_heads) * width
    yield Matrix(part="attention", rows=qkv, columns=hidden, bias=attention.qkv_bias)
    yield Matrix(part="attention", rows=hidden, columns=heads * width, bias=attention.output_bias)


def _mla_matrices(model: ModelSpec, attention: AttentionSpec, tp: int) -> Iterator[Matrix]:
    """Projections of DeepSeek-V2, section 2.1; the down-projections are whole on every rank."""
    heads, hidden = attention.num_heads / tp, model.hidden_size
    latent = attention.kv_lora_rank + attention.qk_rope_head_dim
    query_in = hidden
    if attention.q_lora_rank:
        query_in = attention.q_lora_rank
        yield Matrix(part="attention", rows=query_in, columns=hidden)
    yield Matrix(part="attention", rows=heads * attention.head_dim, columns=query_in)
    yield Matrix(part="attention", rows=latent, columns=hidden)
    expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    yield Matrix(part="attention", rows=expanded, columns=attention.kv_lora_rank)
    yield Matrix(part="attention", rows=hidden, columns=heads * attention.v_head_dim)


def _mlp_matrices(
    model: ModelSpec, mlp: MlpSpec, inter: float, part: str, count: float = 1.0
) -> Iterator[Matrix]:
    up = 2 * inter if mlp.gated else inter
    yield Matrix(part=part, rows=up, columns=model.hidden_size, count=count, bias=mlp.bias)
    yield Matrix(part=part, rows=model.hidden_size, columns=inter, count=count, bias=mlp.bias)


def _moe_matrices(model: ModelSpec, mlp: MlpSpec, config: EngineConfig) -> Iterator[Matrix]:
    yield Matrix(
        part="router", rows=mlp.num_experts, columns=model.hidden_size, bias=mlp.router_bias
    )
    experts = mlp.num_experts / config.moe_expert_parallel_size
    inter = mlp.inter_size / config.moe_tensor_parallel_size
    yield from _mlp_matrices(model, mlp, inter, "experts", count=experts)
    if mlp.shared_inter_size:
        shared = mlp.shared_inter_size / config.attention_tensor_parallel_size
        yield from _mlp_matrices(model, mlp, shared, "shared_experts")
    if mlp.shared_gate:
        yield Matrix(part="router", rows=1, columns=model.hidden_size)


def _vector_parameters(model: ModelSpec, group: LayerGroup) -> int:
    """Norms and sinks of one layer."""
    attention = group.attention
    vectors = model.norms_per_layer * model.hidden_size
    if attention.qk_norm:
        vectors += 2 * attention.head_dim
    if attention.has_sinks:
        vectors += attention.num_heads
    if attention.kind is AttentionKind.MLA:
        vectors += attention.kv_lora_rank + attention.q_lora_rank
    return vectors


def _matrix_bytes(matrix: Matrix, row: Quantization) -> float:
    quantized = matrix.part == "experts" or (
        not row.experts_only and matrix.part in ("attention", "mlp", "shared_experts")
    )
    biases = matrix.count * matrix.rows * UNQUANTIZED_BYTES if matrix.bias else 0.0
    weights = matrix.count * matrix.rows * matrix.columns
    if not quantized:
        return weights * UNQUANTIZED_BYTES + biases
    scales = 0.0
    if not row.group_size and row.compute == "bf16" and row.weight_bits < 16:
        scales = matrix.count * matrix.rows * CHANNEL_SCALE_BYTES
    return weights * row.bits_per_weight / 8 + scales + biases
