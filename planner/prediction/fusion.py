"""What fused kernels are worth to a model: the time that its steps would take without them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cost_models.fusion import Traffic, norm_traffic, swiglu_traffic, unfused_score_traffic
from cost_models.model import LayerGroup
from cost_models.step import StepBatch, StepModel


def fusion_savings(step: StepModel, batch: StepBatch) -> dict[str, float]:
    """Return the seconds a step saves by chain: norms with residuals, SwiGLU, attention.

    Against torch's operators one by one, launched from a CUDA graph as the fused ones are. On an
    H100 the formula comes within 10 % of measured norms from 1,024 tokens on, gives 0.4 to 1.2 of
    them below, 1.0 to 1.7 of SwiGLU and 0.7 to 0.9 of a prompt's attention; scores beside the
    cache of a decode step cost three times as much as it says (`tests/cost_models/test_fusion.py`).
    """
    chains = {
        "norms+residual": sum(_norms_s(step, batch, g) for g in step.model.layer_groups),
        "SwiGLU": sum(_swiglu_s(step, batch, g) for g in step.model.layer_groups),
        "attention": sum(_attention_s(step, batch, g) for g in step.model.layer_groups),
    }
    return {name: float(seconds) for name, seconds in chains.items()}


def _norms_s(step: StepModel, batch: StepBatch, group: LayerGroup) -> float:
    tokens, width = _tokens(batch), step.model.hidden_size
    one_by_one, fused = (norm_traffic(tokens, width, fused=fused) for fused in (False, True))
    saved_s = _seconds(step, [one_by_one]) - _seconds(step, [fused])
    return group.count * step.model.norms_per_layer * saved_s


def _swiglu_s(step: StepModel, batch: StepBatch, group: LayerGroup) -> float:
    """A dense layer, or the shared expert; routed experts are fused with their GEMMs."""
    mlp, tp = group.mlp, step.config.attention_tensor_parallel_size
    inter = (mlp.shared_inter_size if mlp.is_moe else mlp.inter_size) / tp
    if not inter or not mlp.gated:
        return 0.0
    one_by_one, fused = (
        swiglu_traffic(_tokens(batch), inter, fused=fused) for fused in (False, True)
    )
    return group.count * (_seconds(step, [one_by_one]) - _seconds(step, [fused]))


def _attention_s(step: StepModel, batch: StepBatch, group: LayerGroup) -> float:
    """Scores of decoding sequences and of prompts, which the fused kernel keeps on the chip."""
    heads = group.attention.num_heads / step.config.attention_tensor_parallel_size
    window = group.attention.window_size or np.inf
    traffic = []
    if np.any(batch.decode_sequences):
        keys = np.minimum(batch.decode_kv_len, window)
        traffic.append(unfused_score_traffic(heads * np.asarray(batch.decode_sequences), 1, keys))
    if np.any(batch.prefill_tokens):
        prompts = np.asarray(batch.prefill_sequences, np.float64)
        chunk = np.asarray(batch.prefill_tokens) / np.maximum(prompts, 1.0)
        keys = np.asarray(batch.prefill_past) + chunk
        traffic.append(unfused_score_traffic(heads * prompts, chunk, keys))
    return group.count * _seconds(step, traffic)


def _tokens(batch: StepBatch) -> float:
    return float(np.asarray(batch.decode_sequences) + np.asarray(batch.prefill_tokens))


def _seconds(step: StepModel, traffic: Iterable[Traffic]) -> float:
    constants = step.calibration.step
    bytes_per_s = constants.elementwise_efficiency * step.gpu.hbm_bytes_per_s
    launch_s = constants.elementwise_launch_s
    return sum(float(t.seconds(launch_s=launch_s, bytes_per_s=bytes_per_s)) for t in traffic)
