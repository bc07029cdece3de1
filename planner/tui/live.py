"""What the observations of a measurement add up to: rates and latencies of the last seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from executor.machine import GpuSample
    from executor.observe import LoadSeen, Observation

RATE_WINDOW_S = 5.0
"""Over which rates are counted."""

KEPT_LATENCIES = 2000
"""Latest latencies from which percentiles are taken."""


@dataclass(slots=True)
class Live:
    """A measurement as far as it was seen; grows with every observation."""

    phase: str = ""
    left_s: float = 0.0
    load: LoadSeen | None = None
    gpus: tuple[GpuSample, ...] = ()
    kv_used_fraction: float | None = None
    lost_gpus: tuple[int, ...] = ()
    """Numbers of GPUs that answered before and do not any more."""
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_LATENCIES))
    gap_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_LATENCIES))
    rates: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start of the load, tokens/s)."""
    _recent: deque[LoadSeen] = field(default_factory=deque)
    _answered: set[int] = field(default_factory=set)

    def add(self, seen: Observation) -> None:
        """Take in one observation."""
        if _begins_anew(self.load, seen.load):
            for past in (self.ttft_s, self.gap_s, self.rates, self._recent):
                past.clear()
        self.phase, self.left_s, self.gpus = seen.phase, seen.left_s, seen.gpus
        self.kv_used_fraction = seen.kv_used_fraction
        if seen.load is not None:
            self._add_load(seen.load)
        self._note_answers(seen.gpus)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over the last seconds."""
        return self._rate("num_tokens")

    @property
    def requests_per_s(self) -> float:
        """Requests answered per second over the last seconds."""
        return self._rate("num_ended")

    def _add_load(self, load: LoadSeen) -> None:
        self.load = load
        self.ttft_s.extend(load.ttft_s)
        self.gap_s.extend(load.gap_s)
        self._recent.append(load)
        while len(self._recent) > 2 and load.at_s - self._recent[0].at_s > RATE_WINDOW_S:
            self._recent.popleft()
        self.rates.append((load.at_s, self.tokens_per_s))

    def _rate(self, count: str) -> float:
        if not self._recent:
            return 0.0
        last, first = self._recent[-1], self._recent[0]
        if len(self._recent) == 1 or last.at_s <= first.at_s:
            return getattr(last, count) / last.at_s if last.at_s > 0 else 0.0
        return float((getattr(last, count) - getattr(first, count)) / (last.at_s - first.at_s))

    def _note_answers(self, gpus: Iterable[GpuSample]) -> None:
        answering = {number for number, gpu in enumerate(gpus) if _answers(gpu)}
        self._answered |= answering
        self.lost_gpus = tuple(sorted(self._answered - answering))


def percentiles(values: Sequence[float]) -> tuple[float, float] | None:
    """Return median and P99, or None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]


def _begins_anew(before: LoadSeen | None, now: LoadSeen | None) -> bool:
    return before is not None and now is not None and now.at_s < before.at_s


def _answers(gpu: GpuSample) -> bool:
    return gpu.memory_used_bytes is not None or gpu.power_w is not None
