"""How much time is left, and how much of it a phase may take."""

from __future__ import annotations

import time
from dataclasses import dataclass

LEAST_PHASE_S = 1.0
"""What a phase gets that begins when no time is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """A moment at which something ends."""

    until_s: float
    """Of the monotonic clock."""

    @classmethod
    def after(cls, limit_s: float) -> Deadline:
        """Return the moment so many seconds from now."""
        return cls(until_s=time.monotonic() + limit_s)

    @property
    def left_s(self) -> float:
        """Seconds from now; below zero where it is past."""
        return self.until_s - time.monotonic()

    def within(self, limit_s: float) -> float:
        """Return a phase's limit, or what is left where that is less."""
        return max(min(limit_s, self.left_s), LEAST_PHASE_S)
