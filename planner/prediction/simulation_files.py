"""Files of a simulated run: its requests, and a timeline for Perfetto or chrome://tracing."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.files import write_text
from planner.simulator import SimulationResult
from planner.simulator.results import EngineTrace

MICROSECONDS = 1e6
"""Unit of time of the trace-event format."""


def write_requests(result: SimulationResult, path: Path, *, with_itl: bool = False) -> None:
    """Write one JSON object a request, in the columns of a measured run's requests file.

    Args:
        result: What was simulated.
        path: JSONL file to write, whole or not at all.
        with_itl: Add every gap between tokens, for requests that were never paused.
    """
    rows = (_request(result, index, with_itl=with_itl) for index in range(result.num_requests))
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _request(result: SimulationResult, index: int, *, with_itl: bool) -> dict[str, Any]:
    columns = result.requests
    arrival_s = float(columns.arrival_s[index])
    row: dict[str, Any] = {
        "arrival_s": round(arrival_s, 6),
        "isl": int(columns.isl[index]),
        "osl": int(columns.osl[index]),
    }
    if columns.refused[index]:
        return row | {"refused": True}
    decode_s = float(columns.last_token_s[index] - columns.first_token_s[index])
    row |= {
        "queue_ms": _ms(columns.started_s[index] - arrival_s),
        "ttft_ms": _ms(columns.first_token_s[index] - arrival_s),
        "tpot_ms": _ms(decode_s / (row["osl"] - 1)) if row["osl"] > 1 else None,
        "e2el_ms": _ms(columns.last_token_s[index] - arrival_s),
        "preemptions": int(columns.preemptions[index]),
        "cached_tokens": int(columns.cached_tokens[index]),
    }
    if with_itl and not row["preemptions"]:
        times = result.token_times(index).tolist()
        row["itl_ms"] = [_ms(b - a) for a, b in itertools.pairwise(times)]
    return row


def _ms(seconds: float) -> float | None:
    return round(float(seconds) * 1e3, 4) if math.isfinite(seconds) else None


def write_timeline(result: SimulationResult, path: Path) -> None:
    """Write steps, queue and KV occupancy of every engine as trace events."""
    events = [event for pid, trace in enumerate(result.engines) for event in _events(trace, pid)]
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _events(trace: EngineTrace, pid: int) -> Iterator[dict[str, Any]]:
    log = trace.log
    used, wasted = log.used_units / trace.pool.capacity, trace.wasted_fraction
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"engine {pid}"}}
    for row in range(len(log.steps)):
        start_us = float(log.start_s[row]) * MICROSECONDS
        decoding, prompts = int(log.decoding[row]), int(log.prompts[row])
        kind = "decode" if not prompts else "mixed" if decoding else "prefill"
        yield {
            "ph": "X",
            "pid": pid,
            "tid": 0,
            "name": kind,
            "ts": round(start_us, 1),
            "dur": round(float(log.end_s[row]) * MICROSECONDS - start_us, 1),
            "args": {
                "steps": int(log.steps[row]),
                "decoding": decoding,
                "prompts": prompts,
                "prompt_tokens": int(log.prompt_tokens[row]),
            },
        }
        counters = (
            ("sequences", {"decoding": decoding, "waiting": int(log.waiting[row])}),
            ("KV cache used %", {"used": round(100 * float(used[row]), 2)}),
            ("KV cache wasted %", {"wasted": round(100 * float(wasted[row]), 2)}),
        )
        for name, values in counters:
            if any(math.isnan(value) for value in values.values()):
                continue
            yield {"ph": "C", "pid": pid, "name": name, "ts": round(start_us, 1), "args": values}
