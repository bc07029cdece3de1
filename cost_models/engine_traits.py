"""What the cost models must know of the engine that runs: values and functions, no names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost_models.engine import EngineConfig

MEMORY_KNOBS = ("free_gpu_memory_fraction", "gpu_memory_utilization")
"""Knobs that may hold the share of memory that an engine takes; each engine reads one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTraits:
    """How an engine divides memory, captures graphs and schedules, as far as that is its own."""

    name: str
    """The name of the engine in runs, calibrations and `--engine`."""
    memory_knob: str
    """The one of `MEMORY_KNOBS` that the engine reads."""
    takes_share_of_whole_gpu: bool
    """Whether that share is of the whole GPU, not of what weights and activations leave free."""
    captured_batch_sizes: Callable[[EngineConfig], tuple[int, ...]]
    """The decode batches for which graphs are captured, in increasing order; empty without graphs.

    They count sequences, each with the tokens that a step verifies.
    """
    largest_graph_tokens: Callable[[EngineConfig], int]
    """The tokens of the largest captured graph, whole or in pieces; 0 without graphs."""
    captured_pieces: Callable[[EngineConfig], tuple[int, ...]]
    """The numbers of tokens to which steps with prompts are padded, to replay them in pieces.

    It is empty where such steps are not padded.
    """
    pads_drafts: bool
    """Whether sequences without a full draft verify padding."""
    chunk_unit: Callable[[EngineConfig], int]
    """The tokens of which a multiple is taken where a prompt is spread over steps."""
    reuses_partial_blocks: bool
    """Whether a prefix that ends inside a block can be copied from there."""
    knows_block_size_effect: bool
    """Whether runs of other block sizes than that of the tables are behind its calibration."""
