"""The cost of one engine iteration: the only place where operators become seconds.

A step holds some sequences that decode one token and some prompt tokens that are
prefilled. The closed-form estimator and the simulator both call `StepModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.calibration import Calibration
from cost_models.engine import EngineConfig
from cost_models.fusion import ELEMENT_BYTES, norm_traffic, swiglu_traffic
from cost_models.gpu import GpuSpec
from cost_models.kv_cache import kv_heads_per_rank
from cost_models.model import AttentionKind, LayerGroup, ModelSpec
from cost_models.operators.attention import (
    AttentionHeads,
    cache_bytes,
    decode_attention_seconds,
    prefill_attention_seconds,
)
from cost_models.operators.collectives import allreduce_seconds, nccl_seconds
from cost_models.operators.gemm import GemmParams, gemm_seconds
from cost_models.operators.mla import (
    mla_bmm_seconds,
    mla_decode_seconds,
    mla_prefill_seconds,
)
from cost_models.operators.moe import MoeShape, moe_seconds
from cost_models.precision import kv_dtype, quantization
from cost_models.step_constants import (
    EFFICIENCY_BLOCK_TOKENS,
    FP8_NARROW_ROWS,
    FP8_TILE_ROWS,
    LONG_CONTEXT_TOKENS,
)

FloatArray = NDArray[np.float64]
Seconds = TypeVar("Seconds", float, FloatArray)

TOKEN_KNOTS = np.unique(
    np.concatenate(
        [
            np.arange(1, 65),
            np.arange(72, 513, 8),
            np.arange(513, 514),
            np.geomspace(576, 65536, 150).round(),
        ]
    )
)
"""Token counts at which a GEMM is timed once; between them it is interpolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What one step (or an array of steps) works on. Arrays broadcast."""

    decode_sequences: ArrayLike = 0.0
    """Sequences that decode: one token each, or as many rows as the step model verifies."""
    decode_kv_len: ArrayLike = 0.0
    """Mean cached tokens of those sequences."""
    prefill_sequences: ArrayLike = 0.0
    """Prompts, or chunks of prompts."""
    prefill_tokens: ArrayLike = 0.0
    """New prompt tokens over all of those."""
    prefill_past: ArrayLike = 0.0
    """Mean tokens that each prompt has already in the cache."""
    rank_tokens: ArrayLike = np.nan
    """Tokens of an attention-DP rank on average, for the experts that all ranks share.

    NaN where every rank has as many as this one.
    """

    @property
    def running(self) -> FloatArray:
        """Sequences that it works on, prompts among them."""
        decoding = np.asarray(self.decode_sequences, np.float64)
        return np.asarray(decoding + np.asarray(self.prefill_sequences, np.float64))

    @property
    def decode_only(self) -> StepBatch:
        """The same without its prompts."""
        return StepBatch(decode_sequences=self.decode_sequences, decode_kv_len=self.decode_kv_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step, by operator family."""

    by_family: Mapping[str, FloatArray]

    @property
    def seconds(self) -> FloatArray:
        """Time of the whole step."""
        return np.asarray(np.sum(np.broadcast_arrays(*self.by_family.values()), axis=0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepModel:
    """Step cost of one model, on one kind of GPU, under one way to split and store it.

    Only the knobs that shape the operators matter here: precision, parallel sizes,
    attention DP, CUDA graphs. Batch and token limits are the scheduler's affair.
    """

    model: ModelSpec
    config: EngineConfig
    gpu: GpuSpec
    calibration: Calibration
    rows_per_sequence: float = 1.0
    """Tokens of a decoding sequence in one step: its own, and the drafts to verify."""
    uniform_rate: float = 1.0
    """Chance that a sequence brings the rows that a decode graph was captured for.

    Only where all do, the graph is replayed as a whole; else its pieces are launched one by one.
    """

    def cost(self, batch: StepBatch) -> StepCost:
        """Return the time of a pass of `batch` through all layers, by family."""
        sequences, tokens, kv_len, prompts, past = _columns(batch)
        decoding = self._graph_padded(sequences, tokens) * self.rows_per_sequence
        computed = self._piece_padded(decoding + tokens, tokens)
        rank_tokens = np.asarray(batch.rank_tokens, np.float64)
        rank_tokens = rank_tokens + (self.rows_per_sequence - 1) * sequences
        alike = np.isnan(rank_tokens) | (not self.config.enable_attention_dp)
        shared = np.where(alike, computed, rank_tokens)
        families = _Families()
        for group in self.model.layer_groups:
            layer = _Layer(self, group)
            layer.add_projections(families, computed)
            layer.add_attention(families, sequences, kv_len, prompts, tokens, past)
            layer.add_mlp(families, computed, shared)
            layer.add_elementwise(families, computed)
        self._add_head(families, decoding + prompts)
        self._add_gaps(families)
        scaled = families.scaled(self.calibration.step.family_scale)
        self._add_floor(scaled, sequences, tokens)
        step = self.calibration.step
        scaled["host"] = step.host_s + step.host_per_sequence_s * (sequences + prompts)
        return StepCost(by_family=scaled)

    def seconds(self, batch: StepBatch) -> FloatArray:
        """Return the time of a pass of `batch` through all layers."""
        return self.cost(batch).seconds

    def iteration(self, batch: StepBatch) -> StepCost:
        """Return the time of an iteration of the engine: here, that of one step."""
        return self.cost(batch)

    def gemm(self, tokens: FloatArray, n: int, k: int, *, dtype: str = "") -> FloatArray:
        """Return the time of one linear layer, from its curve over token counts."""
        table, step = dtype or self.linear_dtype, self.calibration.step
        wide_s, row_excess = 0.0, step.gemm_row_excess
        if table == "fp8":
            wide_s, row_excess = step.fp8_wide_gemm_s, row_excess + step.fp8_gemm_row_excess
        dynamic = quantization(self.config.quantization).dynamic_activation_scale
        curve = _gemm_curve(
            self.gpu,
            self.calibration.operators.gemm[table].params,
            (n, k),
            static_scales=bool(wide_s) or not dynamic,
        )
        rows = fp8_padded_rows(tokens) if wide_s else tokens
        seconds = np.interp(rows, TOKEN_KNOTS, curve)
        seconds = seconds + row_excess * np.maximum(seconds - curve[0], 0.0)
        seconds = seconds + np.where(tokens > FP8_NARROW_ROWS, wide_s, 0.0)
        return np.where(tokens > 0, seconds, 0.0)

    @property
    def linear_dtype(self) -> str:
        """GEMM table of the linear layers outside the experts."""
        row = quantization(self.config.quantization)
        return "bfloat16" if row.experts_only else row.gemm_dtype

    @property
    def kv_table(self) -> str:
        """Attention table of the KV-cache dtype."""
        return kv_dtype(self.config.kv_cache_dtype).attention_dtype

    def _graph_padded(self, sequences: FloatArray, prefill_tokens: FloatArray) -> FloatArray:
        """Pad pure decode batches to the captured sizes that the engine replays."""
        sizes = np.asarray(self.calibration.traits.captured_batch_sizes(self.config))
        if not sizes.size or not self.config.cuda_graph_padding:
            return sequences
        slot = np.searchsorted(sizes, sequences - 1e-9)
        padded = sizes[np.minimum(slot, sizes.size - 1)]
        in_graph = (prefill_tokens == 0) & (slot < sizes.size) & (sequences > 0)
        return np.where(in_graph, padded, sequences)

    def _in_pieces(self, rows: FloatArray, prefill_tokens: FloatArray) -> NDArray[np.bool_]:
        """Whether a step with prompts is replayed from captured pieces."""
        return np.asarray((prefill_tokens > 0) & (rows <= self._most_in_pieces))

    @property
    def _most_in_pieces(self) -> int:
        """Tokens of the largest step with prompts that is; 0 where none is."""
        traits, captured = self.calibration.traits, self.calibration.step.piecewise_max_tokens
        if captured:
            return min(captured, traits.largest_graph_tokens(self.config))
        return max(traits.captured_pieces(self.config), default=0)

    def _piece_padded(self, rows: FloatArray, prefill_tokens: FloatArray) -> FloatArray:
        """Pad steps with prompts to the captured numbers of tokens, if there are any."""
        pieces = self.calibration.traits.captured_pieces(self.config)
        if not pieces:
            return rows
        slot = np.searchsorted(pieces, np.minimum(rows, pieces[-1]) - 1e-9)
        return np.where(self._in_pieces(rows, prefill_tokens), np.take(pieces, slot), rows)

    def _is_eager(self, sequences: FloatArray, prefill_tokens: FloatArray) -> NDArray[np.bool_]:
        sizes = self.calibration.traits.captured_batch_sizes(self.config)
        return (prefill_tokens > 0) | (sequences > (sizes[-1] if sizes else 0))

    def _add_head(self, families: _Families, rows: FloatArray) -> None:
        """Embedding of the next tokens and logits of the rows that are sampled."""
        tp = self.config.attention_tensor_parallel_size
        vocab_shard = -(-self.model.vocab_size // tp)
        hidden = self.model.hidden_size
        families.add("lm_head", self.gemm(rows, vocab_shard, hidden, dtype="bfloat16"))
        if tp > 1:
            logits_bytes = rows * vocab_shard * ELEMENT_BYTES
            families.add("communication", self.nccl("all_gather", logits_bytes))

    def nccl(self, collective: str, message_bytes: FloatArray) -> FloatArray:
        """Return the time of one NCCL collective over the TP group."""
        return nccl_seconds(
            message_bytes,
            self.config.tensor_parallel_size,
            gpu=self.gpu,
            params=self.calibration.operators.nccl[f"{collective}/half"].params,
        )

    def _add_gaps(self, families: _Families) -> None:
        step = self.calibration.step
        doublings = np.log2(self.config.tensor_parallel_size)
        per_layer = step.layer_gap_s + step.tp_gap_s * doublings
        families.add("gaps", np.asarray(self.model.num_layers * per_layer))

    def launch_floor_s(self, sequences: ArrayLike, prefill_tokens: ArrayLike) -> FloatArray:
        """Return the host time to launch an eager step's kernels, or to replay a graph."""
        sequences = np.asarray(sequences, np.float64)
        tokens = np.asarray(prefill_tokens, np.float64)
        step = self.calibration.step
        eager_layer_s = step.eager_layer_s
        if self.config.tensor_parallel_size > 1:
            eager_layer_s += step.eager_layer_tp_s
        added_s = step.eager_layer_fp8_cache_s if self.kv_table == "fp8" else 0.0
        in_pieces = self._in_pieces(tokens + self.rows_per_sequence * sequences, tokens)
        # A share of what launching takes, so that pieces never take longer than all of it.
        in_pieces_s = min(step.pieces_launch_share, 1.0) * eager_layer_s
        per_layer_s = np.where(in_pieces, in_pieces_s, eager_layer_s + added_s)
        floor_s = self.model.num_layers * per_layer_s + step.eager_sequence_s * sequences
        hidden_s = step.host_floor_s + step.host_floor_per_sequence_s * sequences
        return np.where(self._is_eager(sequences, tokens), floor_s, hidden_s)

    def launch_s(self, gpu_s: Seconds, floor_s: Seconds) -> Seconds:
        """Return what launching its kernels adds to the GPU time of a step."""
        norm = self.calibration.step.eager_norm
        joined: Seconds = (gpu_s**norm + floor_s**norm) ** (1 / norm)
        return joined - gpu_s

    def _add_floor(
        self, families: dict[str, FloatArray], sequences: FloatArray, prefill_tokens: FloatArray
    ) -> None:
        """The host takes its time for a step, however little the GPU has to do."""
        floor_s = self.launch_floor_s(sequences, prefill_tokens)
        gpu_s = np.asarray(np.sum(np.broadcast_arrays(*families.values()), axis=0))
        launch_s = np.where(floor_s > 0, self.launch_s(gpu_s, floor_s), 0.0)
        if self.uniform_rate < 1:
            pieces_s = self.model.num_layers * self.calibration.step.piecewise_decode_layer_s
            ragged = 1 - self.uniform_rate**sequences
            in_pieces_s = ragged * self.launch_s(gpu_s, np.asarray(pieces_s))
            launch_s = np.where(self._is_eager(sequences, prefill_tokens), launch_s, in_pieces_s)
        families["launch"] = launch_s


class _Families:
    """Seconds by operator family, summed as layers are added."""

    def __init__(self) -> None:
        self.seconds: dict[str, FloatArray] = {}

    def add(self, family: str, seconds: FloatArray, *, layers: int = 1) -> None:
        self.seconds[family] = self.seconds.get(family, np.zeros(())) + layers * seconds

    def scaled(self, scale: Mapping[str, float]) -> dict[str, FloatArray]:
        return {name: value * scale.get(name, 1.0) for name, value in self.seconds.items()}


class _Layer:
    """Adds the operators of one group of equal layers."""

    def __init__(self, step: StepModel, group: LayerGroup) -> None:
        self.step = step
        self.group = group
        self.hidden = step.model.hidden_size
        self.tp = step.config.tensor_parallel_size
        self.attention_tp = step.config.attention_tensor_parallel_size
        self.operators = step.calibration.operators

    def add_projections(self, families: _Families, tokens: FloatArray) -> None:
        attention, count, gemm = self.group.attention, self.group.count, self.step.gemm
        heads = attention.num_heads // self.attention_tp
        if attention.kind is AttentionKind.MLA:
            latent = attention.kv_lora_rank + attention.qk_rope_head_dim
            query_in = attention.q_lora_rank or self.hidden
            families.add(
                "gemm", gemm(tokens, attention.q_lora_rank + latent, self.hidden), layers=count
            )
            families.add("gemm", gemm(tokens, heads * attention.head_dim, query_in), layers=count)
            output_width = heads * attention.v_head_dim
        else:
            kv_heads = kv_heads_per_rank(attention, self.attention_tp)
            width = (heads + 2 * kv_heads) * attention.head_dim
            families.add("gemm", gemm(tokens, width, self.hidden), layers=count)
            output_width = heads * attention.head_dim
        families.add("gemm", gemm(tokens, self.hidden, output_width), layers=count)
        if self.attention_tp > 1:
            families.add("communication", self._allreduce(tokens), layers=count)

    def add_attention(
        self,
        families: _Families,
        sequences: FloatArray,
        kv_len: FloatArray,
        prompts: FloatArray,
        tokens: FloatArray,
        past: FloatArray,
    ) -> None:
        mla = self.group.attention.kind is AttentionKind.MLA
        decode = self._mla_decode if mla else self._decode
        prefill = self._mla_prefill if mla else self._prefill
        count = self.group.count
        families.add(
            "attention_decode", _where_any(sequences, decode, sequences, kv_len), layers=count
        )
        chunk = tokens / np.maximum(prompts, 1.0)
        families.add(
            "attention_prefill", _where_any(tokens, prefill, prompts, chunk, past), layers=count
        )

    def _heads(self) -> AttentionHeads:
        attention = self.group.attention
        return AttentionHeads(
            num_heads=attention.num_heads // self.attention_tp,
            num_kv_heads=kv_heads_per_rank(attention, self.attention_tp),
            head_dim=attention.head_dim,
            window_size=attention.window_size,
        )

    def _decode(self, sequences: FloatArray, kv_len: FloatArray) -> FloatArray:
        params = self.operators.attention_decode[self.step.kv_table].params
        constants = self.step.calibration.step
        bytes_per_s = constants.attention_decode_efficiency * self.step.gpu.hbm_bytes_per_s
        launch_s = constants.attention_decode_launch_s
        excess = constants.attention_decode_long_excess
        if self.step.kv_table == "fp8":
            bytes_per_s = min(bytes_per_s, self._conversion_bytes_per_s())
            launch_s = constants.attention_decode_fp8_launch_s
            excess = constants.attention_decode_fp8_long_excess
        if bytes_per_s:
            read_bytes = cache_bytes(self._heads(), sequences, kv_len, params=params)
            slowed = 1.0 + excess * kv_len / (kv_len + LONG_CONTEXT_TOKENS)
            return launch_s + slowed * read_bytes / bytes_per_s
        return decode_attention_seconds(
            self._heads(), sequences, kv_len, gpu=self.step.gpu, params=params, cache_cold=True
        )

    def _conversion_bytes_per_s(self) -> float:
        """Return the rate at which the kernel converts an FP8 cache to what it computes in."""
        per_flop = self.step.calibration.step.attention_decode_fp8_bytes_per_flop
        return per_flop * self._block_speedup() * self.step.gpu.peak_flop_per_s("bf16")

    def _block_speedup(self) -> float:
        gain = self.step.calibration.step.attention_decode_fp8_block_gain
        doublings = math.log2(self.step.config.tokens_per_block / EFFICIENCY_BLOCK_TOKENS)
        return math.exp(gain * doublings)

    def _prefill(self, prompts: FloatArray, chunk: FloatArray, past: FloatArray) -> FloatArray:
        params = self.operators.attention_prefill[self.step.kv_table].params
        return prefill_attention_seconds(
            self._heads(), chunk, past, prompts, gpu=self.step.gpu, params=params
        )

    def _mla_decode(self, sequences: FloatArray, kv_len: FloatArray) -> FloatArray:
        heads = self.group.attention.num_heads // self.attention_tp
        gpu, rows = self.step.gpu, self.step.rows_per_sequence
        core = mla_decode_seconds(
            # All rows of a sequence attend to the same latents, as its heads do.
            heads * rows,
            sequences,
            kv_len,
            gpu=gpu,
            params=self.operators.mla_decode[self.step.kv_table].params,
        )
        absorb = sum(
            mla_bmm_seconds(
                heads, sequences * rows, gpu=gpu, params=self.operators.mla_bmm[op].params
            )
            for op in ("mla_gen_pre/bfloat16", "mla_gen_post/bfloat16")
        )
        return core + absorb

    def _mla_prefill(self, prompts: FloatArray, chunk: FloatArray, past: FloatArray) -> FloatArray:
        attention = self.group.attention
        heads = attention.num_heads // self.attention_tp
        core = mla_prefill_seconds(
            heads,
            chunk,
            past,
            prompts,
            gpu=self.step.gpu,
            params=self.operators.mla_prefill[self.step.kv_table].params,
        )
        expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        return core + self.step.gemm(prompts * (chunk + past), expanded, attention.kv_lora_rank)

    def add_mlp(self, families: _Families, tokens: FloatArray, rank_tokens: FloatArray) -> None:
        """Add a dense layer, or the experts with the tokens that their ranks bring on average."""
        mlp, count = self.group.mlp, self.group.count
        if not mlp.is_moe:
            families.add("gemm", self._dense_mlp(tokens, mlp.inter_size), layers=count)
            if self.tp > 1:
                families.add("communication", self._allreduce(tokens), layers=count)
            return
        router = self.step.gemm(tokens, mlp.num_experts, self.hidden, dtype="bfloat16")
        families.add("gemm", router, layers=count)
        if mlp.shared_inter_size:
            families.add("gemm", self._dense_mlp(tokens, mlp.shared_inter_size), layers=count)
        families.add("moe", self._experts(rank_tokens), layers=count)
        families.add("communication", self._combine(rank_tokens), layers=count)

    def _dense_mlp(self, tokens: FloatArray, inter_size: int) -> FloatArray:
        shard = -(-inter_size // self.attention_tp)
        up_width = shard * (2 if self.group.mlp.gated else 1)
        up = self.step.gemm(tokens, up_width, self.hidden)
        return up + self.step.gemm(tokens, self.hidden, shard)

    def _experts(self, tokens: FloatArray) -> FloatArray:
        mlp, config = self.group.mlp, self.step.config
        row = quantization(config.quantization)
        shape = MoeShape(
            hidden_size=self.hidden,
            inter_size=mlp.inter_size,
            top_k=mlp.top_k,
            num_experts=mlp.num_experts,
            moe_tp_size=config.moe_tensor_parallel_size,
            moe_ep_size=config.moe_expert_parallel_size,
            gated=mlp.gated,
        )
        params = self.operators.moe[row.moe_dtype].params
        entering = tokens * config.attention_dp_ranks
        return moe_seconds(
            shape, entering, gpu=self.step.gpu, params=params, weight_bits=row.bits_per_weight
        )

    def _combine(self, tokens: FloatArray) -> FloatArray:
        """Bring the experts' outputs together over the TP group."""
        if self.tp == 1:
            return np.zeros(())
        if not self.step.config.enable_attention_dp:
            return self._allreduce(tokens)
        gathered = tokens * self.tp * self.hidden * ELEMENT_BYTES
        return self.step.nccl("all_gather", gathered) + self.step.nccl("reduce_scatter", gathered)

    def _allreduce(self, tokens: FloatArray) -> FloatArray:
        return allreduce_seconds(
            tokens * self.hidden * ELEMENT_BYTES,
            self.tp,
            gpu=self.step.gpu,
            params=self.operators.allreduce["bfloat16"].params,
        )

    def add_elementwise(self, families: _Families, tokens: FloatArray) -> None:
        """Residuals with their norms and the gated activation, as fused as engines run them."""
        mlp, step = self.group.mlp, self.step.calibration.step
        norms = self.step.model.norms_per_layer
        chains = [norm_traffic(tokens, self.hidden, fused=True)] * norms
        inter = mlp.shared_inter_size if mlp.is_moe else mlp.inter_size
        if inter:
            chains.append(swiglu_traffic(tokens, inter / self.attention_tp, fused=True))
        launch_s = step.elementwise_launch_s
        bytes_per_s = step.elementwise_efficiency * self.step.gpu.hbm_bytes_per_s
        seconds = sum(
            (c.seconds(launch_s=launch_s, bytes_per_s=bytes_per_s) for c in chains),
            np.asarray(launch_s * self.group.attention.qk_norm),
        )
        families.add("elementwise", seconds, layers=self.group.count)


def fp8_padded_rows(rows: FloatArray) -> FloatArray:
    """Return the rows that vLLM's FP8 GEMM on Hopper works on: a tile's where they fit one."""
    padded = rows
    for lowest, tile in pairwise((FP8_NARROW_ROWS, *FP8_TILE_ROWS)):
        padded = np.where((rows > lowest) & (rows <= tile), tile, padded)
    return padded


_CurveKey = tuple[int, int, tuple[int, int], bool]
_curves: dict[_CurveKey, tuple[GpuSpec, GemmParams, FloatArray]] = {}
"""Memo of `_gemm_curve`, keyed by identity; it holds the objects, so identities stay theirs."""

MOST_CURVES = 20_000


def _gemm_curve(
    gpu: GpuSpec, params: GemmParams, shape: tuple[int, int], *, static_scales: bool
) -> FloatArray:
    """Time one linear layer at every token knot; layers, steps and fits share the result."""
    key = (id(gpu), id(params), shape, static_scales)
    if key not in _curves:
        if len(_curves) >= MOST_CURVES:
            _curves.clear()
        n, k = shape
        curve = gemm_seconds(
            TOKEN_KNOTS,
            n,
            k,
            gpu=gpu,
            params=params,
            weights_cold=True,
            static_scales=static_scales,
        )
        _curves[key] = (gpu, params, curve)
    return _curves[key][2]


def _columns(batch: StepBatch) -> tuple[FloatArray, ...]:
    columns = (
        batch.decode_sequences,
        batch.prefill_tokens,
        batch.decode_kv_len,
        batch.prefill_sequences,
        batch.prefill_past,
    )
    return tuple(np.broadcast_arrays(*(np.asarray(c, dtype=np.float64) for c in columns)))


def _where_any(
    present: FloatArray, operator: Callable[..., FloatArray], *arguments: FloatArray
) -> FloatArray:
    """Time the operator only for the steps in which it has work to do."""
    result = np.zeros(present.shape)
    active = present > 0
    if active.any():
        result[active] = operator(*(argument[active] for argument in arguments))
    return result
