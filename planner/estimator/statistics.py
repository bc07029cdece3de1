"""Mean and percentiles of a metric, computed where somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from cost_models.metrics import PERCENTILES

FloatArray = NDArray[np.float64]


class Statistics(Mapping[str, FloatArray]):
    """The mean, and each percentile by its name in `PERCENTILES`.

    A search asks for thousands of estimates, and of most of them for the one percentile that its
    SLO limits.
    """

    def __init__(self, mean: FloatArray, quantile: Callable[[str], FloatArray]) -> None:
        self._mean = mean
        self._quantile = quantile

    def __getitem__(self, name: str) -> FloatArray:
        """Return a statistic; percentiles are computed anew each time."""
        return self._mean if name == "mean" else self._quantile(name)

    def __iter__(self) -> Iterator[str]:
        """Yield the names, the mean first."""
        return iter(("mean", *PERCENTILES))

    def __len__(self) -> int:
        """Return how many there are."""
        return 1 + len(PERCENTILES)
