"""What the block size does to vLLM's attention: `python -m tests.bench.block_size_attention`.

Steps that only decode are cut out of measured runs by the times of their tokens. Within a run,
their time is a constant, a share a sequence (the same for all runs of a precision) and a share a
cached token: the attention. Runs of one load, precision and KV dtype that differ in block size
then say what a doubling of it does to that share.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

FloatArray = NDArray[np.float64]

WINDOW_S = 0.15
"""Stretch of decode steps that is one observation."""

AFTER_PREFILL_S = 0.02
"""After a first token the step that made it may still be in what follows."""

MOST_SEQUENCES, LEAST_SPREAD_TOKENS = 24, 3e4
"""Runs of few, long sequences, whose attention varies: elsewhere other costs drown it."""

FOLDERS = (Path("docs/regret"), Path("profiles/runs/h200_vllm"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """When the tokens of one request came, in seconds."""

    sent_s: float
    token_s: FloatArray
    isl: int

    @classmethod
    def of(cls, line: dict[str, Any]) -> Request:
        """Read a line of a requests file."""
        gaps_s = np.asarray(line.get("itl_ms") or [], np.float64) / 1e3
        first_s = line["arrival_s"] + line["ttft_ms"] / 1e3
        token_s = first_s + np.concatenate([[0.0], np.cumsum(gaps_s)])
        return cls(sent_s=line["arrival_s"], token_s=token_s, isl=line["isl"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Decode steps of one run: seconds, sequences and cached tokens, a row a window."""

    load: str
    precision: str
    kv_dtype: str
    block_size: int
    windows: FloatArray


def decode_windows(requests: Sequence[Request]) -> FloatArray:
    """Return the windows in which no request waits, starts or ends."""
    rows = [
        row
        for start_s, end_s in quiet(requests)
        for low_s in np.arange(start_s, end_s - WINDOW_S, WINDOW_S)
        if (row := window(requests, low_s, low_s + WINDOW_S))
    ]
    return np.array(rows, np.float64).reshape(-1, 3)


def quiet(requests: Sequence[Request]) -> Iterator[tuple[float, float]]:
    """Yield the stretches in which no request is between being sent and its first token."""
    quiet_from_s = 0.0
    for request in sorted(requests, key=lambda r: r.sent_s):
        if request.sent_s > quiet_from_s:
            yield quiet_from_s, request.sent_s
        quiet_from_s = max(quiet_from_s, request.token_s[0] + AFTER_PREFILL_S)
    yield quiet_from_s, max(float(r.token_s[-1]) for r in requests)


def window(
    requests: Sequence[Request], low_s: float, high_s: float
) -> tuple[float, float, float] | None:
    """Return a window's median step, sequences and cached tokens; None where one ends in it."""
    steps, cached = [], 0.0
    for request in requests:
        times = request.token_s
        if times[0] <= low_s and times[-1] >= high_s:
            first, last = np.searchsorted(times, (low_s, high_s))
            if last - first >= 3:
                steps.append((times[last - 1] - times[first]) / (last - 1 - first))
                cached += request.isl + (first + last) / 2
        elif times[0] < high_s and times[-1] > low_s:
            return None
    return (float(np.median(steps)), len(steps), cached) if steps else None


def read_runs(folder: Path) -> Iterator[Run]:
    """Yield the runs of a folder that can tell."""
    for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        config, workload = run["config"], run["workload"]
        with gzip.open(folder / workload["requests_file"], "rt") as file:
            requests = [Request.of(json.loads(row)) for row in file]
        windows = decode_windows(requests)
        if len(windows) < 8 or windows[:, 1].max() > MOST_SEQUENCES:
            continue
        if np.ptp(windows[:, 2]) > LEAST_SPREAD_TOKENS:
            lengths = sum(r.isl for r in requests)
            yield Run(
                load=f"{folder.name} {run['model']} {workload['protocol']} {lengths}",
                precision=config["quantization"],
                kv_dtype=config["kv_cache_dtype"],
                block_size=config["tokens_per_block"],
                windows=windows,
            )


def token_seconds(runs: Sequence[Run]) -> FloatArray:
    """Return each run's seconds a cached token: least squares in relative error, all together."""
    precisions = sorted({run.precision for run in runs})
    rows = []
    for i, run in enumerate(runs):
        for seconds, sequences, tokens in run.windows:
            row = np.zeros(2 * len(runs) + len(precisions))
            row[2 * i], row[2 * i + 1] = 1.0, tokens / 1e6
            row[2 * len(runs) + precisions.index(run.precision)] = sequences / 1e2
            rows.append(row / seconds)
    solution, *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return np.asarray(solution[1 : 2 * len(runs) : 2] / 1e6)


def doubling_effect(runs: Sequence[Run], seconds: FloatArray) -> tuple[float, float]:
    """Return what a doubling of the block does to attention in log, and half its 90 % interval.

    Every load and precision has a level of its own.
    """
    levels = sorted({(run.load, run.precision) for run in runs})
    rows = [
        [float((run.load, run.precision) == level) for level in levels] + [np.log2(run.block_size)]
        for run in runs
    ]
    x, y = np.array(rows), np.log(seconds)
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    freedom = len(y) - x.shape[1]
    variance = float(np.sum((y - x @ solution) ** 2)) / freedom
    error = np.sqrt(variance * np.linalg.inv(x.T @ x)[-1, -1])
    return float(solution[-1]), float(student.ppf(0.95, freedom) * error)


def comparable(runs: Sequence[Run]) -> list[int]:
    """Return the runs beside which others, alike but for the block size, were measured."""
    sizes: dict[tuple[str, str, str], set[int]] = {}
    for run in runs:
        sizes.setdefault((run.load, run.precision, run.kv_dtype), set()).add(run.block_size)
    return [
        i for i, run in enumerate(runs) if len(sizes[run.load, run.precision, run.kv_dtype]) > 1
    ]


def main() -> None:
    """Print seconds a cached token by run, and the effect by KV dtype."""
    folders = [Path(name) for name in sys.argv[1:]] or FOLDERS
    runs = [run for folder in folders for run in read_runs(folder)]
    seconds = token_seconds(runs)
    print("weights      KV    block  windows  ns a cached token")  # noqa: T201
    kept = comparable(runs)
    for i in sorted(kept, key=lambda i: (runs[i].kv_dtype, runs[i].precision, runs[i].block_size)):
        run = runs[i]
        name = f"{run.precision:12} {run.kv_dtype:5} {run.block_size:5}"
        print(f"{name}  {len(run.windows):7}  {1e9 * seconds[i]:17.2f}")  # noqa: T201
    for kv in sorted({runs[i].kv_dtype for i in kept}):
        chosen = [i for i in kept if runs[i].kv_dtype == kv]
        effect, half = doubling_effect([runs[i] for i in chosen], seconds[chosen])
        print(  # noqa: T201
            f"{kv}: {100 * effect:+.2f} % of attention a doubling of tokens_per_block "
            f"({100 * (effect - half):+.2f} to {100 * (effect + half):+.2f}, {len(chosen)} runs)"
        )


if __name__ == "__main__":
    main()
