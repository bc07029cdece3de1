"""Batch sizes for which TensorRT-LLM 1.2 captures CUDA graphs of its decode step."""

from __future__ import annotations

from cost_models.engine import EngineConfig

PIECE_TOKENS = (*(1 << doubling for doubling in range(8)), *range(256, 3073, 256))
"""Tokens for which the pieces of a step with prompts are captured, by default.

`torch_compile_config.capture_num_tokens`; such a step is padded to the next of them, always
(docs/source/features/torch_compile_and_piecewise_cuda_graph.md).
"""


def captured_batch_sizes(config: EngineConfig) -> tuple[int, ...]:
    """Return the captured decode batch sizes in increasing order; empty when graphs are off."""
    largest = largest_graph(config)
    if largest <= 0:
        return ()
    if config.cuda_graph_padding:
        return _up_to(largest, _padded_sizes(largest))
    return _up_to(largest, _unpadded_sizes(largest))


def largest_graph(config: EngineConfig) -> int:
    """Return the sequences of the largest captured batch."""
    return min(config.cuda_graph_max_batch_size, config.max_batch_size)


def captured_pieces(config: EngineConfig) -> tuple[int, ...]:
    """Return the tokens of the captured pieces; empty where they are not asked for."""
    return PIECE_TOKENS if config.enable_piecewise_cuda_graph else ()


def _padded_sizes(largest: int) -> list[int]:
    """Return the sizes with padding: 1, 2, 4, then every 8 to 128, then powers of two."""
    return [1, 2, 4, *range(8, 129, 8), *_powers_of_two(256, largest)]


def _unpadded_sizes(largest: int) -> list[int]:
    """Return the sizes without padding: every size to 32, 64, 128, then powers of two."""
    return [*range(1, 33), 64, 128, *_powers_of_two(256, largest)]


def _powers_of_two(first: int, largest: int) -> list[int]:
    return [first << i for i in range(16) if first << i <= largest]


def _up_to(largest: int, sizes: list[int]) -> tuple[int, ...]:
    """Drop sizes beyond the largest and end with the largest itself."""
    return (*(size for size in sizes if size < largest), largest)
