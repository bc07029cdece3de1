"""Reads measured runs: what a prediction may know of them, and what was measured.

The format is one JSON object a line, described in `docs/runs.md`. Only configuration,
workload, prompt and output lengths and open-loop arrivals may enter a prediction;
everything under `measured` is for the comparison, save how often drafts were right: that belongs to
the text.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.acceptance import Acceptance, DraftCounts
from cost_models.cluster import Cluster
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.engine_rules import check_values
from cost_models.errors import ConfigError, PlannerError, ProfileError
from cost_models.gpu import GpuSpec
from cost_models.metrics import PERCENTILES
from engines.registry import defaults_of
from planner.workloads.load import ArrivalMode, Lengths, Load

PROTOCOLS = ("closed_loop", "open_loop", "offline", "capacity")

IGNORED_CONFIG = frozenset({"max_output_tokens"})
"""Keys of a run's config that are not knobs of the engine."""


ACCEPTED_AT = "num_accepted_draft_tokens_at"
"""Accepted draft tokens of a run, by position behind a dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One line of a runs file."""

    run_id: str
    gpu: str
    num_gpus: int
    engine: str
    engine_version: str
    model: str
    config: Mapping[str, Any]
    workload: Mapping[str, Any]
    measured: Mapping[str, float]
    """Flat, `ttft_ms.mean` style."""
    folder: Path
    """Where `requests_file` is looked up."""
    flags: tuple[str, ...] = ()
    """What spoiled the run, as `throttled`."""
    notes: str = ""
    """What a reader must know, as that weights were random."""

    @property
    def protocol(self) -> str:
        """How requests were sent; `capacity` serves none."""
        return str(self.workload["protocol"])

    def engine_config(self) -> EngineConfig:
        """Return the run's configuration; what it does not state is the engine's default.

        Raises:
            ConfigError: A knob has a value that no engine takes.
        """
        known = {field.name: str(field.type) for field in fields(EngineConfig)}
        stated = {
            name: _typed(name, value, known[name])
            for name, value in self.config.items()
            if name in known and value is not None
        }
        defaults = defaults_of(self.engine)
        config = EngineConfig(**{**defaults, **stated})
        check_values(config)
        return config

    def deployment(self, config: EngineConfig, gpu: GpuSpec) -> Deployment:
        """Return what served the run: as many servers of a configuration as its GPUs hold."""
        num_servers = max(self.num_gpus // config.num_gpus, 1)
        cluster = Cluster(gpu=gpu, num_gpus=max(self.num_gpus, config.num_gpus))
        return Deployment.of(config, cluster, num_servers=num_servers)

    def load(self) -> Load:
        """Return what the run asked the engine to serve.

        Raises:
            ProfileError: The workload is incomplete, or its requests file cannot be read.
        """
        isl, osl, arrivals = self.lengths()
        protocol = ArrivalMode(self.protocol)
        num_requests = self.workload.get("num_requests") or (len(isl) if len(isl) > 1 else 0)
        rate, cv = self._arrivals(protocol, arrivals)
        shared = float(self.workload.get("shared_prefix_tokens") or 0)
        return Load(
            protocol=protocol,
            isl=lengths_of(isl),
            reusable_prefix_tokens=min(shared, float(np.median(isl)) / 2),
            osl=lengths_of(osl),
            concurrency=float(self.workload.get("concurrency") or 0.0),
            rate_per_s=rate,
            arrival_cv=cv,
            num_requests=float(num_requests),
            max_output_tokens=float(osl.max()),
            acceptances=self._acceptances(),
        )

    def _acceptances(self) -> dict[str, Acceptance]:
        """Return how often the run's drafts were right: like its lengths, a property of its text.

        It may enter a prediction, as what a configuration makes of it may not.
        """
        counts = self.draft_counts()
        return {str(self.config["decoding_type"]): counts.acceptance()} if counts else {}

    def draft_counts(self) -> DraftCounts | None:
        """Return what the engine counted of its drafts; None where nothing was drafted.

        Raises:
            ProfileError: The workload states no lengths.
        """
        measured = self.measured
        if not self.config.get("decoding_type") or not measured.get("num_drafts"):
            return None
        _, osl, _ = self.lengths()
        positions = range(int(self.config.get("max_draft_len") or 0))
        return DraftCounts(
            accepted_at=tuple(measured.get(f"{ACCEPTED_AT}.{i}", 0.0) for i in positions),
            num_drafts=measured["num_drafts"],
            num_draft_tokens=measured.get("num_draft_tokens", 0.0),
            num_tokens=self._num_requests(osl) * float(osl.mean() - 1),
        )

    def num_prompt_tokens(self) -> float:
        """Return the prompt tokens of all requests.

        Raises:
            ProfileError: The workload states no lengths.
        """
        isl, _, _ = self.lengths()
        return self._num_requests(isl) * float(isl.mean())

    def _num_requests(self, lengths: NDArray[Any]) -> float:
        return len(lengths) if len(lengths) > 1 else float(self.workload.get("num_requests") or 0)

    @property
    def has_text(self) -> bool:
        """Whether its drafts and prefixes say anything of real text."""
        return not any(note in self.notes for note in ("random weights", "synthetic acceptance"))

    def lengths(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return prompt lengths, output lengths and arrivals (s): one entry where all are equal.

        Raises:
            ProfileError: Neither lengths nor a requests file, or the file cannot be read.
        """
        if "requests_file" in self.workload:
            return read_requests(self.folder / str(self.workload["requests_file"]))
        try:
            isl, osl = float(self.workload["isl"]), float(self.workload["osl"])
        except (KeyError, TypeError, ValueError):
            raise ProfileError(
                f"{self.run_id}: the workload states no isl and osl",
                hint="give both, or a requests_file",
            ) from None
        return np.array([isl]), np.array([osl]), np.array([])

    def _arrivals(self, protocol: ArrivalMode, arrivals: NDArray[Any]) -> tuple[float, float]:
        if protocol is not ArrivalMode.OPEN_LOOP:
            return 0.0, 1.0
        if "rate_per_s" in self.workload:
            burstiness = float(self.workload.get("burstiness") or 1.0)
            return float(self.workload["rate_per_s"]), 1.0 / math.sqrt(burstiness)
        gaps = np.diff(np.sort(arrivals))
        if gaps.size == 0 or gaps.sum() <= 0:
            raise ProfileError(f"{self.run_id}: open loop without a rate or arrivals")
        return float(1.0 / gaps.mean()), float(gaps.std() / gaps.mean())


def lengths_of(tokens: NDArray[Any]) -> Lengths:
    """Return the moments and percentiles of a sample of lengths."""
    mean = float(tokens.mean())
    return Lengths(
        mean=mean,
        cv=float(tokens.std() / mean) if mean else 0.0,
        quantiles={name: float(np.quantile(tokens, q)) for name, q in PERCENTILES.items()},
        maximum=float(tokens.max()),
    )


def read_runs(path: str | Path) -> Iterator[tuple[MeasuredRun | None, str, str]]:
    """Yield (run, run id, reason) for each line; the run is None where it cannot be used.

    Raises:
        ProfileError: The file is missing, not text, or holds no line.
    """
    path = Path(path)
    lines = [line for line in _read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ProfileError(f"{path}: holds no runs")
    for number, line in enumerate(lines, 1):
        try:
            run = parse_run(json.loads(line), path.parent)
        except json.JSONDecodeError as error:
            raise ProfileError(f"{path}: line {number} is not JSON ({error})") from None
        except PlannerError as error:
            yield None, f"line {number}", str(error)
        else:
            yield run, run.run_id, ""


def read_streams(run: MeasuredRun) -> list[dict[str, Any]]:
    """Return a run's requests with the times of their tokens; none where they were not kept.

    Raises:
        ProfileError: The file is missing or damaged.
    """
    if "requests_file" not in run.workload:
        return []
    rows = _request_rows(run.folder / str(run.workload["requests_file"]))
    return [row for row in rows if row.get("itl_ms")]


def _request_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in _read_text(path).splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ProfileError(f"{path}: not a requests file ({error!r})") from None


@cache
def read_requests(path: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return prompt lengths, output lengths and arrivals (s) of a requests file.

    Raises:
        ProfileError: Missing or damaged.
    """
    rows = _request_rows(path)
    try:
        columns = [np.array([float(row[k]) for row in rows]) for k in ("isl", "osl", "arrival_s")]
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: not a requests file ({error!r})") from None
    if not rows:
        raise ProfileError(f"{path}: holds no requests")
    return columns[0], columns[1], columns[2]


def flat_metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return `{"ttft_ms": {"mean": 5}}` as `{"ttft_ms.mean": 5}`, numbers only."""
    flat: dict[str, float] = {}
    for name, value in measured.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{k}": float(v) for k, v in value.items() if _is_number(v)}
        elif _is_number(value):
            flat[name] = float(value)
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, EOFError) as error:
        raise ProfileError(f"{path}: not a text file ({error})") from None


def _typed(knob: str, value: Any, kind: str) -> Any:
    """Return a knob's value if its JSON type is the knob's."""
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    accepted = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{knob}={value!r} is not of type {kind}")
    return value


NUMBERS: Mapping[str, tuple[float, float]] = {
    "isl": (1, 10_000_000),
    "osl": (1, 10_000_000),
    "concurrency": (1, 1_000_000),
    "num_requests": (1, 10_000_000),
    "shared_prefix_tokens": (0, 10_000_000),
    "rate_per_s": (1e-9, 1e6),
    "burstiness": (1e-4, 1e6),
}
"""Smallest and largest value of what a workload states."""


def _check_workload(run_id: object, workload: Mapping[str, Any]) -> None:
    for name, (low, high) in NUMBERS.items():
        value = workload.get(name)
        if value is not None and not (_is_number(value) and low <= value <= high):
            raise ProfileError(
                f"{run_id}: workload.{name} is {value!r}", hint=f"accepted: {low:g} to {high:g}"
            )
    if workload["protocol"] == "closed_loop" and workload.get("concurrency") is None:
        raise ProfileError(f"{run_id}: a closed loop states its concurrency")


def parse_run(data: Any, folder: Path) -> MeasuredRun:
    """Return one line of a runs file, checked.

    Args:
        data: The line's JSON.
        folder: Where its requests file is looked up.

    Raises:
        ProfileError: Not a run, or one that states its workload wrongly.
    """
    if not isinstance(data, Mapping):
        raise ProfileError("not a JSON object")
    missing = [k for k in ("gpu", "engine", "model", "config", "workload") if k not in data]
    if missing:
        raise ProfileError(f"{data.get('run_id')}: lacks {', '.join(missing)}")
    workload = data["workload"]
    if workload.get("protocol") not in PROTOCOLS:
        raise ProfileError(
            f"{data.get('run_id')}: workload.protocol is {workload.get('protocol')!r}",
            hint=f"known: {', '.join(PROTOCOLS)}",
        )
    _check_workload(data.get("run_id"), workload)
    num_gpus = data.get("num_gpus") or 1
    if not (_is_number(num_gpus) and 1 <= num_gpus <= 4096):
        raise ProfileError(f"{data.get('run_id')}: num_gpus is {num_gpus!r}")
    return MeasuredRun(
        run_id=str(data.get("run_id")),
        gpu=str(data["gpu"]),
        num_gpus=int(num_gpus),
        engine=str(data["engine"]),
        engine_version=str(data.get("engine_version") or ""),
        model=str(data["model"]),
        config=data["config"],
        workload=workload,
        measured=flat_metrics(data.get("measured") or {}),
        folder=folder,
        flags=tuple(map(str, data.get("flags") or ())),
        notes=str(data.get("notes") or ""),
    )
