"""How far a deployment is from feasible: one measure for the search, decisions and predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

DOES_NOT_FIT = 1e6
REFUSES = 1e3
"""Steps of the measure: what does not fit is farther from feasible than what refuses requests, and
that is farther than what only misses limits."""


def violation(
    *, shortfall: ArrayLike, refused_share: ArrayLike, excess: Mapping[str, ArrayLike]
) -> NDArray[np.float64]:
    """Return 0 where a deployment is feasible, and more the farther it is from that.

    Args:
        shortfall: Bytes that a GPU is short of, as a share of its memory; 0 or less fits.
        refused_share: Share of the requests that the engine refuses.
        excess: Predicted over allowed, less 1, by limit of the SLO and of quality.
    """
    short, refused = np.asarray(shortfall, np.float64), np.asarray(refused_share, np.float64)
    over = sum((np.maximum(value, 0.0) for value in excess.values()), np.zeros(short.shape))
    missed = np.minimum(over, REFUSES)
    return np.where(
        short > 0,
        DOES_NOT_FIT * (1.0 + short),
        np.where(refused > 0, REFUSES * (1.0 + refused) + missed, missed),
    )
