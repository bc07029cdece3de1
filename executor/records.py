"""Measured runs and requests, and their files: runs as JSON lines, requests as gzipped ones.

Milliseconds exist only in the files; every value here is in seconds.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.metrics import Distribution, RequestTimes, serving_metrics

SCHEMA_VERSION = 1


class RequestStatus(StrEnum):
    """How a request ended."""

    OK = "ok"
    WRONG_LENGTH = "wrong_length"
    """Another number of tokens than asked for."""
    REFUSED = "refused"
    """An HTTP status other than 200, or an error instead of tokens."""
    TIMED_OUT = "timed_out"
    LOST = "lost"
    """No connection, or one that broke."""
    CANCELLED = "cancelled"
    """The run's time was over, or it was interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRequest:
    """What the client saw of one request."""

    arrival_s: float
    """When it was sent, from the start of the run."""
    late_s: float = 0.0
    """How long after it was due."""
    isl: int
    osl: int
    """Tokens received."""
    chunk_s: tuple[float, ...] = ()
    """When each streamed chunk came, from the arrival."""
    chunk_tokens: tuple[int, ...] = ()
    """Tokens in each chunk."""
    status: RequestStatus = RequestStatus.OK
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """From the arrival to the first token; NaN where none came."""
        return self.chunk_s[0] if self.chunk_s else math.nan

    @property
    def e2el_s(self) -> float:
        """From the arrival to the last token; NaN where none came."""
        return self.chunk_s[-1] if self.chunk_s else math.nan

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Gaps between chunks."""
        return tuple(np.diff(self.chunk_s).tolist())

    def to_json(self) -> dict[str, Any]:
        """Return the request as a line of a requests file; times in ms."""
        line: dict[str, Any] = {
            "arrival_s": round(self.arrival_s, 6),
            "isl": self.isl,
            "osl": self.osl,
            "ttft_ms": _milliseconds(self.ttft_s),
            "e2el_ms": _milliseconds(self.e2el_s),
            "itl_ms": [round(gap_s * 1e3, 2) for gap_s in self.itl_s],
        }
        if any(tokens != 1 for tokens in self.chunk_tokens):
            line["chunk_tokens"] = list(self.chunk_tokens)
        if self.status is not RequestStatus.OK:
            line |= {"status": str(self.status), "error": self.error}
        return line


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One line of a runs file: what ran where, and what came out.

    `config`, `workload` and `measured` are in the file's terms, so that a run from
    elsewhere and one measured here read the same.
    """

    run_id: str
    source: str
    gpu: str
    num_gpus: int = 1
    engine: str
    engine_version: str | None = None
    model: str
    config: Mapping[str, Any]
    workload: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    """The load generator's own lag, and whether it limited the run."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """GPU, driver, clocks, power, versions, exact command."""
    predicted: Mapping[str, Any] = field(default_factory=dict)
    """What the planner said before, by metric."""
    flags: tuple[str, ...] = ()
    """Why to distrust the numbers, as `throttled` or `client_limited`."""
    status: str = "ok"
    error: str = ""
    """Why the run failed, with the tail of the engine's log."""
    notes: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the run as a JSON object; empty optional parts are left out."""
        line: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for name in self.__slots__:
            value = getattr(self, name)
            optional = name in ("client", "machine", "predicted", "flags", "error")
            if value or not optional:
                line[name] = _plain(value)
        return line


def request_times(requests: Iterable[MeasuredRequest]) -> RequestTimes:
    """Return the requests that ended well as columns, for `serving_metrics`."""
    served = [request for request in requests if request.status is RequestStatus.OK]
    gaps = [np.diff(request.chunk_s) for request in served]
    return RequestTimes(
        arrival_s=np.array([request.arrival_s for request in served]),
        ttft_s=np.array([request.ttft_s for request in served]),
        e2el_s=np.array([request.e2el_s for request in served]),
        osl=np.array([request.osl for request in served], dtype=np.int64),
        itl_s=np.concatenate(gaps) if gaps else np.array([]),
    )


def measured_section(requests: Sequence[MeasuredRequest]) -> dict[str, Any]:
    """Return a run's `measured` section: latencies in ms, rates, and requests that failed."""
    metrics = serving_metrics(request_times(requests))
    failed = sum(request.status is not RequestStatus.OK for request in requests)
    return {
        "ttft_ms": _distribution_ms(metrics.ttft_s),
        "tpot_ms": _distribution_ms(metrics.tpot_s),
        "itl_ms": _distribution_ms(metrics.itl_s),
        "e2el_ms": _distribution_ms(metrics.e2el_s),
        "output_tok_per_s": round(metrics.output_tok_per_s, 2),
        "request_per_s": round(metrics.request_per_s, 4),
        "duration_s": round(metrics.duration_s, 3),
        "num_failed_requests": failed,
    }


def append_run(path: Path, run: RunRecord) -> None:
    """Add a run to a runs file; on return it is on the disk."""
    _append(path, (json.dumps(run.to_json()) + "\n").encode())


def append_requests(path: Path, requests: Iterable[MeasuredRequest], *, run_id: str) -> None:
    """Add a run's requests to a gzipped file that several runs share, as a member of its own."""
    _append(path, gzip.compress(_lines(requests, {"run_id": run_id}), mtime=0))


def write_requests(path: Path, requests: Iterable[MeasuredRequest]) -> None:
    """Write a run's requests file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(gzip.compress(_lines(requests, {}), mtime=0))
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _lines(requests: Iterable[MeasuredRequest], extra: Mapping[str, Any]) -> bytes:
    return "".join(json.dumps({**extra, **r.to_json()}) + "\n" for r in requests).encode()


def _append(path: Path, data: bytes) -> None:
    """Add all of the data or, where the disk is full, none of it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    old_size = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, old_size)
        raise
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _milliseconds(seconds: float) -> float | None:
    return round(seconds * 1e3, 3) if math.isfinite(seconds) else None


def _distribution_ms(distribution: Distribution) -> dict[str, float | None]:
    names = ("mean", "p50", "p90", "p95", "p99")
    return {name: _milliseconds(getattr(distribution, name)) for name in names}
