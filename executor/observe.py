"""What can be seen of a measurement while it goes on, for somebody who watches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from executor.backend import Server
from executor.load_generator import LoadView
from executor.machine import GpuReader, GpuSample

INTERVAL_S = 0.5
"""Between two looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSeen:
    """A load so far, and the latencies that came since the last look."""

    at_s: float
    """Since the first request of the load."""
    num_prompts: int
    num_sent: int
    num_ended: int
    num_tokens: int
    ttft_s: tuple[float, ...] = ()
    """Of the requests whose first token came since the last look."""
    gap_s: tuple[float, ...] = ()
    """Between two streamed chunks of a request, since the last look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One look at a measurement."""

    phase: str
    left_s: float
    """Of the time budget."""
    load: LoadSeen | None = None
    """None while no load is sent."""
    gpus: tuple[GpuSample, ...] = ()
    """Empty where there is no GPU."""
    kv_used_fraction: float | None = None
    """Share of the KV cache in use; None where the engine does not tell."""


Observe = Callable[[Observation], None]


@dataclass(slots=True)
class LoadWatch:
    """Reads a running load piece by piece; for one thread beside that of the load."""

    view: LoadView
    _read: list[tuple[int, bool]] = field(default_factory=list)
    """Of each request that was sent: chunks read, and whether all were."""
    _num_ended: int = 0
    _num_tokens: int = 0

    def look(self) -> LoadSeen:
        """Return the load as it stands."""
        ttft_s: list[float] = []
        gap_s: list[float] = []
        exchanges = self.view.exchanges
        num_sent = len(exchanges)
        self._read += [(0, False)] * (num_sent - len(self._read))
        for index, (start, is_read) in enumerate(self._read):
            if is_read:
                continue
            exchange = exchanges[index]
            # Looked at before the chunks: what ends now is read whole at the next look.
            has_ended = exchange.has_ended
            times, counts = exchange.stream.chunk_s, exchange.stream.chunk_tokens
            end = min(len(times), len(counts))
            self._num_ended += has_ended
            self._num_tokens += sum(counts[start:end])
            if start == 0 and end and exchange.reply is not None:
                ttft_s.append(times[0] - exchange.reply.sent_s)
            first = max(start, 1)
            gap_s += [b - a for a, b in zip(times[first - 1 : end], times[first:end], strict=False)]
            self._read[index] = (end, has_ended)
        return LoadSeen(
            at_s=self.view.elapsed_s,
            num_prompts=self.view.num_prompts,
            num_sent=num_sent,
            num_ended=self._num_ended,
            num_tokens=self._num_tokens,
            ttft_s=tuple(ttft_s),
            gap_s=tuple(gap_s),
        )


class Observer:
    """Looks at a measurement in a thread of its own; a context manager.

    Args:
        observe: Told what is seen; None starts no thread.
        reader: Reads the GPUs.
        interval_s: Between two looks.
    """

    def __init__(
        self, observe: Observe | None, reader: GpuReader, *, interval_s: float = INTERVAL_S
    ) -> None:
        self._observe = observe
        self._reader = reader
        self._interval_s = interval_s
        self._phase = Observation(phase="", left_s=0.0)
        self._load: LoadWatch | None = None
        self._server: Server | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Observer:
        """Start looking."""
        if self._observe is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take a last look."""
        self._stop.set()
        if self._observe is not None:
            self._thread.join()
            self.look()

    def enter_phase(self, phase: str, left_s: float) -> None:
        """Note what is done now."""
        self._phase = replace(self._phase, phase=phase, left_s=left_s)

    def watch_load(self, view: LoadView | None, server: Server | None) -> None:
        """Note which load is sent now, and to which server; None ends it, after a last look."""
        if view is None and self._observe is not None:
            self.look()
        with self._lock:
            self._load = None if view is None else LoadWatch(view)
            self._server = server

    def look(self) -> None:
        """Tell what is seen now."""
        if self._observe is None:
            return
        with self._lock:
            load = self._load.look() if self._load is not None else None
            server = self._server
        self._observe(
            replace(
                self._phase,
                load=load,
                gpus=_samples(self._reader),
                kv_used_fraction=server.kv_used_fraction() if server is not None else None,
            )
        )

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()


def _samples(reader: GpuReader) -> tuple[GpuSample, ...]:
    samples: Sequence[GpuSample] = reader.sample()
    return tuple(samples)
