"""What can be seen of a measurement while it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from executor.backend import Launch
from executor.case import Case
from executor.http_stream import Reply
from executor.load_generator import (
    Endpoint,
    Exchange,
    LoadResult,
    LoadView,
    Prompt,
    run_load,
)
from executor.machine import GpuSample, NvmlReader
from executor.measure import measure
from executor.observe import LoadSeen, LoadWatch, Observation, Observer
from executor.protocols import ClosedLoop
from executor.store import RunStore
from tests.executor.completion_server import CompletionServer
from tests.executor.test_measure import TRAFFIC, tools


@pytest.mark.usefixtures("stand_ins")
def test_a_measurement_is_seen_as_it_runs(deployment: Launch, tmp_path: Path) -> None:
    seen: list[Observation] = []
    case = Case(deployment=deployment, traffic=TRAFFIC, gpu="h200_sxm")
    measure(case, tools(RunStore(str(tmp_path / "runs.db")), observe=seen.append))
    runs = [s.load for s in seen if s.load is not None and s.phase.startswith("run")]
    assert runs[-1].num_ended == runs[-1].num_sent == 8
    assert runs[-1].num_tokens == 8 * 6
    first_run = [s.load for s in seen if s.load is not None and s.phase.startswith("run 1")]
    assert sum(len(load.ttft_s) for load in first_run) == 8
    assert sum(len(load.gap_s) for load in first_run) == 8 * 5
    assert {s.phase.split()[0] for s in seen} >= {"warm", "run"}
    assert all(s.gpus == () for s in seen)


def test_a_load_is_read_piece_by_piece() -> None:
    view = LoadView(num_prompts=2)
    watch = LoadWatch(view)
    assert watch.look().num_sent == 0
    exchange = Exchange(due_s=0.0)
    exchange.reply = Reply(sent_s=1.0)
    view.exchanges.append(exchange)
    _arrive(exchange, 1.5, 1)
    first = watch.look()
    assert (first.ttft_s, first.gap_s, first.num_tokens) == ((0.5,), (), 1)
    _arrive(exchange, 1.75, 2)
    _arrive(exchange, 2.0, 1)
    exchange.has_ended = True
    second = watch.look()
    assert (second.ttft_s, second.gap_s) == ((), (0.25, 0.25))
    assert (second.num_tokens, second.num_ended) == (4, 1)
    assert watch.look().gap_s == ()


def test_a_reply_seen_half_way_has_its_first_token() -> None:
    server, view = CompletionServer(gap_s=0.01), LoadView()
    watch, seen = LoadWatch(view), list[LoadSeen]()

    async def main() -> LoadResult:
        async with server.running():
            endpoint = Endpoint(port=server.port, model="m")
            prompts = [Prompt(token_ids=[1], osl=20)] * 2
            protocol = ClosedLoop(concurrency=1)
            load = asyncio.create_task(run_load(endpoint, prompts, protocol=protocol, view=view))
            while not load.done():
                seen.append(watch.look())
                await asyncio.sleep(0.002)
            return await load

    requests = asyncio.run(main()).requests
    seen.append(watch.look())
    first_s = [ttft_s for look in seen for ttft_s in look.ttft_s]
    assert first_s == pytest.approx([request.ttft_s for request in requests])
    assert any(look.ttft_s and look.num_ended < look.num_sent for look in seen)


def test_a_gpu_that_vanishes_leaves_readings_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml  # noqa: PLC0415

    class Lost:
        """NVML once the GPU has fallen off the bus."""

        NVMLError = pynvml.NVMLError
        NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = 0

        def __getattr__(self, name: str) -> Any:
            def fail(*_: object) -> None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

            return fail

    reader = NvmlReader(0)
    monkeypatch.setattr(reader, "_nvml", Lost())
    monkeypatch.setattr(reader, "_handles", [object()])
    seen: list[Observation] = []
    Observer(seen.append, reader).look()
    assert seen[0].gpus == (GpuSample(),)
    assert reader.identity() == {"num_gpus_seen": 1}


def _arrive(exchange: Exchange, at_s: float, tokens: int) -> None:
    exchange.stream.chunk_s.append(at_s)
    exchange.stream.chunk_tokens.append(tokens)
