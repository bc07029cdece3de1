"""Batch sizes for which an engine captures CUDA graphs of its decode step."""

from __future__ import annotations

from functools import cache

from cost_models.engine import EngineConfig

PIECE_TOKENS = (*(1 << doubling for doubling in range(8)), *range(256, 3073, 256))
"""Tokens for which TensorRT-LLM 1.2 captures the pieces of a step with prompts, by default.

`torch_compile_config.capture_num_tokens`; such a step is padded to the next of them, always
(docs/source/features/torch_compile_and_piecewise_cuda_graph.md).
"""


def captured_batch_sizes(config: EngineConfig, engine: str = "trtllm") -> tuple[int, ...]:
    """Return the captured decode batch sizes in increasing order; empty when graphs are off.

    Sequences, each with the tokens that a step verifies: vLLM counts tokens, in multiples of those.
    """
    if engine == "vllm":
        rows = rows_per_sequence(config)
        return _vllm_captured(vllm_largest(config), rows)
    largest = min(config.cuda_graph_max_batch_size, config.max_batch_size)
    if largest <= 0:
        return ()
    if config.cuda_graph_padding:
        return _up_to(largest, _padded_sizes(largest))
    return _up_to(largest, _unpadded_sizes(largest))


def _padded_sizes(largest: int) -> list[int]:
    """TensorRT-LLM 1.2 with padding: 1, 2, 4, then every 8 to 128, then powers of two."""
    return [1, 2, 4, *range(8, 129, 8), *_powers_of_two(256, largest)]


def _unpadded_sizes(largest: int) -> list[int]:
    """TensorRT-LLM 1.2 without padding: every size to 32, 64, 128, then powers of two."""
    return [*range(1, 33), 64, 128, *_powers_of_two(256, largest)]


def rows_per_sequence(config: EngineConfig) -> int:
    """Return the tokens that a decoding sequence brings into a step."""
    return 1 + config.max_draft_len if config.speculates else 1


def vllm_largest(config: EngineConfig) -> int:
    """Return the tokens of the largest graph of vLLM, whole or in pieces.

    Twice the batch limit at most, as `VllmConfig._set_cudagraph_sizes` has it.
    """
    most = 2 * rows_per_sequence(config) * config.max_batch_size
    return min(config.cuda_graph_max_batch_size, most)


@cache
def _vllm_captured(largest: int, rows: int) -> tuple[int, ...]:
    """Return the batches of so many rows a sequence that vLLM captures up to the largest."""
    if largest < rows:
        return ()
    rounded = (-(-size // rows) for size in _up_to(largest, _vllm_sizes(largest)))
    return tuple(sorted({size for size in rounded if size * rows <= largest}))


def _vllm_sizes(largest: int) -> list[int]:
    """Return vLLM's sizes: 1, 2, 4, every 8 to 256, then every 16."""
    return [1, 2, 4, *range(8, 257, 8), *range(272, largest + 1, 16)]


def _powers_of_two(first: int, largest: int) -> list[int]:
    return [first << i for i in range(16) if first << i <= largest]


def _up_to(largest: int, sizes: list[int]) -> tuple[int, ...]:
    """Drop sizes beyond the largest and end with the largest itself."""
    return (*(size for size in sizes if size < largest), largest)
