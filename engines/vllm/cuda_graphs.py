"""Batch sizes for which vLLM 0.25 captures CUDA graphs.

It counts tokens, in multiples of those that a step verifies for a sequence.
"""

from __future__ import annotations

from functools import cache

from cost_models.engine import EngineConfig


def captured_batch_sizes(config: EngineConfig) -> tuple[int, ...]:
    """Return the captured decode batch sizes in increasing order; empty when graphs are off."""
    return _captured(largest_graph_tokens(config), rows_per_sequence(config))


def rows_per_sequence(config: EngineConfig) -> int:
    """Return the tokens that a decoding sequence brings into a step."""
    return 1 + config.max_draft_len if config.speculates else 1


def largest_graph_tokens(config: EngineConfig) -> int:
    """Return the tokens of the largest graph, whole or in pieces.

    Twice the batch limit at most, as `VllmConfig._set_cudagraph_sizes` has it.
    """
    most = 2 * rows_per_sequence(config) * config.max_batch_size
    return min(config.cuda_graph_max_batch_size, most)


@cache
def _captured(largest: int, rows: int) -> tuple[int, ...]:
    """Return the batches of so many rows a sequence that are captured up to the largest."""
    if largest < rows:
        return ()
    rounded = (-(-size // rows) for size in _sizes(largest))
    return tuple(sorted({size for size in rounded if size * rows <= largest}))


def _sizes(largest: int) -> list[int]:
    """Return 1, 2, 4, every 8 to 256, then every 16 below the largest, and the largest itself."""
    grid = (1, 2, 4, *range(8, 257, 8), *range(272, largest + 1, 16))
    return [*(size for size in grid if size < largest), largest]
