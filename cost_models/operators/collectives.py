"""Seconds of the collectives that tensor and expert parallelism need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.gpu import GpuSpec
from cost_models.operators.grid import ResidualGrid

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceParams:
    """TensorRT-LLM's own all-reduce: the better of a one-shot and a two-shot kernel."""

    one_shot_s: float
    """Latency when every rank reads all others at once."""
    one_shot_efficiency: float
    """Share of the link's rate that it reaches."""
    two_shot_s: float
    """Latency of reduce-scatter followed by all-gather."""
    two_shot_efficiency: float
    rank_s: float
    """Additional latency for each peer."""
    residual: ResidualGrid | None = None
    """Over (message_bytes, num_gpus)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclParams:
    """One NCCL collective: latency and bandwidth joined by a p-norm."""

    latency_s: float
    rank_s: float
    """Additional latency for each peer."""
    efficiency: float
    """Share of the link's rate."""
    norm: float
    passes: float
    """Times that the message crosses the link: 2 for all-reduce, else 1."""
    residual: ResidualGrid | None = None
    """Over (message_bytes, num_gpus)."""


def allreduce_seconds(
    message_bytes: ArrayLike, num_gpus: ArrayLike, *, gpu: GpuSpec, params: AllReduceParams
) -> FloatArray:
    """Return the time to sum `message_bytes` over ranks; one rank sends nothing."""
    size, ranks = _columns(message_bytes, num_gpus)
    peers = ranks - 1
    link = gpu.link_bytes_per_s
    one_shot = params.one_shot_s + peers * size / (params.one_shot_efficiency * link)
    two_shot = params.two_shot_s + 2 * peers / ranks * size / (params.two_shot_efficiency * link)
    seconds = np.minimum(one_shot, two_shot) + params.rank_s * peers
    return _corrected(seconds, size, ranks, params.residual)


def nccl_seconds(
    message_bytes: ArrayLike, num_gpus: ArrayLike, *, gpu: GpuSpec, params: NcclParams
) -> FloatArray:
    """Return the time of a NCCL collective; one rank sends nothing.

    Args:
        message_bytes: The whole message: input of reduce-scatter, output of all-gather.
        num_gpus: Ranks.
        gpu: Gives the link's rate.
        params: Constants of the collective.
    """
    size, ranks = _columns(message_bytes, num_gpus)
    peers = ranks - 1
    alpha = params.latency_s + params.rank_s * peers
    beta = params.passes * peers / ranks * size / (params.efficiency * gpu.link_bytes_per_s)
    seconds = (alpha**params.norm + beta**params.norm) ** (1 / params.norm)
    return _corrected(seconds, size, ranks, params.residual)


def _columns(message_bytes: ArrayLike, num_gpus: ArrayLike) -> tuple[FloatArray, FloatArray]:
    columns = (np.asarray(v, dtype=np.float64) for v in (message_bytes, num_gpus))
    size, ranks = np.broadcast_arrays(*columns)
    return size, ranks


def _corrected(
    seconds: FloatArray, size: FloatArray, ranks: FloatArray, residual: ResidualGrid | None
) -> FloatArray:
    if residual is not None:
        seconds = seconds * residual.factor(size, ranks)
    return np.where((ranks > 1) & (size > 0), seconds, 0.0)
