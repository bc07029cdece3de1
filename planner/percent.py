"""Probabilities in words."""

from __future__ import annotations


def probability_words(probability: float) -> str:
    """Return a probability in whole percent; none is called certain."""
    percent = round(100 * probability)
    if percent in (0, 100):
        return ">99 %" if percent else "<1 %"
    return f"{percent} %"
