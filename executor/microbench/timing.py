"""Times a call: by CUDA events around replays of a graph, or by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

WARM_UPS = 3
CALLS_PER_SAMPLE = 5
SAMPLES = 9


def call_s(work: Callable[[], Any], device: str, *, in_graph: bool = True) -> float:
    """Return the median time of a call.

    Args:
        work: One call.
        device: `cuda` or `cpu`.
        in_graph: Whether a CUDA graph takes the host's launch time out of it.
    """
    if device == "cpu":
        return _cpu_s(work)
    return _cuda_s(_graphed(work) if in_graph else work, CALLS_PER_SAMPLE if in_graph else 1)


def _cpu_s(work: Callable[[], Any]) -> float:
    work()
    samples = []
    for _ in range(SAMPLES):
        start_s = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start_s)
    return median(samples)


def _graphed(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return a replay of several calls, captured after a warm-up on a stream of its own."""
    import torch  # noqa: PLC0415

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread may look at its events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS_PER_SAMPLE):
            work()
    replay: Callable[[], Any] = graph.replay
    return replay


def _cuda_s(call: Callable[[], Any], calls: int) -> float:
    import torch  # noqa: PLC0415

    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    samples: list[float] = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3 / calls)
    return median(samples)
