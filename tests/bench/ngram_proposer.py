"""Time of vLLM's search for n-grams: `python -m tests.bench.ngram_proposer NGRAM_PROPOSER_PY`.

Takes the file `v1/spec_decode/ngram_proposer.py` of vLLM's source and needs numba; nothing else of
vLLM is imported. Prints nanoseconds per cached token, contexts of random tokens, one thread.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from tests.bench import run_bench

LOADS = ((1, 640), (8, 640), (64, 640), (64, 8192), (1, 100_000))
"""Sequences, and tokens of each."""

VOCAB_SIZE, DRAFT_LEN, LARGEST_NGRAM, REPEATS = 128_256, 3, 2, 30


def main() -> None:
    """Print a line for each load."""
    propose = compiled(Path(sys.argv[1]))
    for sequences, tokens in LOADS:
        seconds = search_s(propose, sequences, tokens)
        click.echo(
            f"{sequences:3} sequences of {tokens:7,} tokens: {1e6 * seconds:8.1f} us, "
            f"{1e9 * seconds / (sequences * tokens):6.2f} ns a token"
        )


def compiled(path: Path) -> Any:
    """Return vLLM's compiled search: the part of its file that needs numba alone."""
    source = path.read_text()
    names: dict[str, Any] = {}
    imports = "import numpy as np\nfrom numba import jit, njit, prange\n"
    exec(imports + source[source.index("@njit(parallel=True)") :], names)  # noqa: S102  vLLM's file
    return names["batch_propose_numba"]


def search_s(propose: Any, sequences: int, tokens: int) -> float:
    """Return the least time of a search over all sequences of a batch."""
    from numba import set_num_threads  # noqa: PLC0415  needed here alone

    set_num_threads(1)
    random = np.random.default_rng(0)
    context = random.integers(0, VOCAB_SIZE, (sequences, tokens + DRAFT_LEN)).astype(np.int32)
    lengths = np.full(sequences, tokens, np.int32)
    drafts = np.zeros((sequences, DRAFT_LEN), np.int32)
    counts = np.zeros(sequences, np.int32)
    took_s = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        propose(
            list(range(sequences)), lengths, context, 1, LARGEST_NGRAM, tokens + 1000, DRAFT_LEN,
            drafts, counts,
        )  # fmt: skip
        took_s.append(time.perf_counter() - start_s)
    return min(took_s)


if __name__ == "__main__":
    run_bench(main)
