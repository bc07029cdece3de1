"""Prefill attention over prompts, chunk length and past, interpolated in three directions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cost_models.operators.flash import TILE_TOKENS
from planner.simulator.curve_table import geometric_knots, never_falling, refined_knots

FloatArray = NDArray[np.float64]

EXACT_TILES = 16
"""Chunks of up to so many query tiles are tabulated at both edges of every tile."""

CHUNK_RATIO = 1.12
PAST_RATIO = 2.0
PROMPT_RATIO = 1.2
"""Spacing of the grids, before those over chunks and past are refined."""

INTERPOLATION_ERROR = 5e-3
"""Relative error of the interpolant above which a grid is refined."""

SAMPLED_PROMPTS = np.array([1.0, 4.0, 32.0])
SAMPLED_CHUNKS = np.array([16.0, 256.0, 2048.0])
SAMPLED_PASTS = np.array([0.0, 1000.0, 8000.0])
"""Where the other two directions are while one grid is refined."""

Seconds = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
"""Time of prefill attention over prompts, chunk and past, which broadcast."""


class PrefillTable:
    """Seconds of prefill attention as a function of three scalars.

    Attention works in tiles of queries, so time over chunk length is a staircase: short
    chunks have a knot on both sides of every step. A plane over past and chunk is made
    when its number of prompts is first asked for.
    """

    __slots__ = ("_chunk", "_past", "_planes", "_prompts", "_seconds")

    def __init__(
        self, seconds: Seconds, *, max_prompts: int, max_chunk: int, max_past: int
    ) -> None:
        self._seconds = seconds
        self._prompts: list[float] = geometric_knots(1, max_prompts, PROMPT_RATIO).tolist()
        self._chunk: list[float] = _chunk_knots(seconds, max_chunk).tolist()
        self._past: list[float] = _past_knots(seconds, max_past).tolist()
        self._planes: list[list[list[float]] | None] = [None] * len(self._prompts)

    def __call__(self, prompts: float, chunk: float, past: float) -> float:
        """Return the seconds of `prompts` chunks of `chunk` new tokens that have `past` cached."""
        i, x = _position(self._prompts, prompts)
        near = self._in_plane(i, chunk, past)
        return near + x * (self._in_plane(i + 1, chunk, past) - near) if x else near

    def _in_plane(self, i: int, chunk: float, past: float) -> float:
        plane = self._planes[i] or self._tabulated(i)
        k, z = _position(self._chunk, chunk)
        if past <= 0:
            row = plane[0]
            return row[k] + z * (row[k + 1] - row[k])
        j, y = _position(self._past, past)
        near, far = plane[j], plane[j + 1]
        at_near = near[k] + z * (near[k + 1] - near[k])
        return at_near + y * (far[k] + z * (far[k + 1] - far[k]) - at_near)

    def _tabulated(self, i: int) -> list[list[float]]:
        past, chunk = np.array(self._past)[:, None], np.array(self._chunk)
        prompts = np.full((past.size, chunk.size), self._prompts[i])
        seconds = self._seconds(prompts, chunk, past)
        plane: list[list[float]] = never_falling(never_falling(seconds).T).T.tolist()
        self._planes[i] = plane
        return plane


def _position(knots: Sequence[float], value: float) -> tuple[int, float]:
    """Return the interval that holds `value` and how far along it lies, clamped to the table."""
    i = bisect_right(knots, value, 1, len(knots) - 1) - 1
    share = (value - knots[i]) / (knots[i + 1] - knots[i])
    return i, share if share < 1.0 else 1.0


def _chunk_knots(seconds: Seconds, max_chunk: int) -> FloatArray:
    """Both edges of every tile at first, of ever fewer tiles later."""
    tiles = np.arange(1, EXACT_TILES + 1)
    most = max(-(-max_chunk // TILE_TOKENS), EXACT_TILES + 1)
    later = geometric_knots(EXACT_TILES, most, CHUNK_RATIO)
    last = np.unique(np.concatenate([tiles, later])) * TILE_TOKENS
    first_tile = geometric_knots(1, TILE_TOKENS, PAST_RATIO)
    knots = np.unique(np.concatenate([first_tile, last, last + 1]))
    others = SAMPLED_PROMPTS[:, None, None], SAMPLED_PASTS[:, None]
    within_tiles = knots[knots <= TILE_TOKENS]
    refined, _ = refined_knots(
        lambda chunk: seconds(others[0], chunk, others[1]),
        within_tiles,
        tolerance=INTERPOLATION_ERROR,
    )
    return np.unique(np.concatenate([refined, knots]))


def _past_knots(seconds: Seconds, max_past: int) -> FloatArray:
    start = np.append(0.0, geometric_knots(TILE_TOKENS, max(max_past, 2 * TILE_TOKENS), PAST_RATIO))
    others = SAMPLED_PROMPTS[:, None, None], SAMPLED_CHUNKS[:, None]
    knots, _ = refined_knots(
        lambda past: seconds(others[0], others[1], past), start, tolerance=INTERPOLATION_ERROR
    )
    return knots
