"""What is asked of a deployment, as columns: one entry a request, in order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """Lengths of every request, and what schedulers may know of it."""

    isl: IntArray
    osl: IntArray
    max_tokens: IntArray
    """Output that the client allows: at least `osl`."""
    priority: IntArray | None = None
    """Class of service; 0 is the most urgent."""
    predicted_osl: FloatArray | None = None
    """What a length predictor says; `osl` where absent."""
    prefix_hashes: Sequence[Sequence[int]] | None = None
    """Identities of prefix blocks, one list a request (Mooncake's form)."""
    prefix_hash_tokens: int = 512
    """Prompt tokens that one hash stands for."""
    prefix_tail_tokens: int = 0
    """Tokens that prompts with equal hashes share behind the last of them."""

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.isl)

    @classmethod
    def of(cls, isl: IntArray, osl: IntArray, *, max_output_tokens: int = 0) -> Requests:
        """Return requests that all allow `max_output_tokens`, or more where they produce more."""
        isl, osl = np.asarray(isl, np.int64), np.asarray(osl, np.int64)
        return cls(isl=isl, osl=osl, max_tokens=np.maximum(osl, max_output_tokens))

    def at(self, rows: NDArray[np.intp]) -> Requests:
        """Return these requests, in this order."""
        hashes = self.prefix_hashes
        return replace(
            self,
            isl=self.isl[rows],
            osl=self.osl[rows],
            max_tokens=self.max_tokens[rows],
            priority=None if self.priority is None else self.priority[rows],
            predicted_osl=None if self.predicted_osl is None else self.predicted_osl[rows],
            prefix_hashes=None if hashes is None else [hashes[row] for row in rows],
        )

    def repeated(self, times: int) -> Requests:
        """Return these requests several times over; repeats share no prefix with each other."""
        hashes = self.prefix_hashes
        everything = self.at(np.tile(np.arange(len(self)), times))
        if hashes is None:
            return everything
        apart = 1 + max((max(own) for own in hashes if own), default=0)
        moved = [[block + turn * apart for block in own] for turn in range(times) for own in hashes]
        return replace(everything, prefix_hashes=moved)

    def with_predictor(self, rng: np.random.Generator, *, log_sd: float) -> Requests:
        """Return the same with output lengths predicted to a log-normal error."""
        error = np.exp(log_sd * rng.standard_normal(len(self)))
        return replace(self, predicted_osl=np.asarray(self.osl * error, np.float64))
