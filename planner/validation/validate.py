"""Compares predictions with measurements: serving runs, and operator tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.calibration import Calibration
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.errors import PlannerError
from cost_models.gpu import GpuSpec
from cost_models.model import ModelSpec
from cost_models.profile_io import load_gpu, load_model
from engines.base import MeasuredLoad
from engines.registry import as_run, find_engine, is_engine, load_calibration
from planner.own_calibrations import files_in_force
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import Outcome, outcome_of, predict_deployment
from planner.validation.drift import Drift, Watched, drift_lines, drifts
from planner.workloads.demand import run_demand
from planner.workloads.load import ArrivalMode, Lengths, Load
from planner.workloads.measured import MeasuredRun, read_runs

REQUESTS_NEEDED: Mapping[str, int] = {"p90": 50, "p95": 100, "p99": 200}
"""Fewest requests of a run from which a percentile is scored."""

FRONT_END_LIMITED = 0.8
"""Share of the front end's time above which a run says little about the GPU."""

CAPACITY_METRICS = (
    "max_sequences",
    "kv_cache_tokens",
    "kv_cache_bytes_per_gpu",
    "weight_bytes_per_gpu",
    "cuda_graph_bytes_per_gpu",
)


JUDGED = frozenset(
    {
        "tpot_ms.mean", "tpot_ms.p99", "output_tok_per_s", "output_tok_per_s_per_gpu",
        "e2el_ms.p50", "e2el_ms.p99", "ttft_ms.mean", "ttft_ms.p50", "ttft_ms.p99", "itl_ms.p99",
        "kv_cache_tokens",
    }
)  # fmt: skip
"""Metrics whose errors and intervals are shown for each kind of load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run: what was predicted beside what was measured, by metric."""

    run: MeasuredRun
    predicted: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    front_end_share: float
    regime: str = ""
    """Kind of load, as predicted: `planner.prediction.intervals.load_regime`."""

    def drifts(self) -> list[Drift]:
        """Metrics far outside their interval; none where the front end hides the GPU."""
        if self.front_end_share >= FRONT_END_LIMITED:
            return []
        predicted = {name: (value, self.intervals[name]) for name, value in self.predicted.items()}
        return drifts(self.run.run_id, self.run.measured, predicted)

    def scored(self) -> Iterable[str]:
        """Metrics that were measured, predicted, and rest on enough requests."""
        requests = _num_requests(self.run)
        for name, measured in self.run.measured.items():
            needed = REQUESTS_NEEDED.get(name.split(".")[-1], 0)
            if name in self.predicted and measured > 0 and requests >= needed:
                yield name


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricError:
    """Error of one metric over several runs, in percent of the measurement."""

    n: int
    mape_pct: float
    median_ape_pct: float
    bias_pct: float
    coverage_90_pct: float
    """Share of the measurements inside the 90 % interval."""
    interval_90_rel_width_pct: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one GPU, engine and model, spelled as the runs do."""

    gpu: str
    engine: str
    model: str
    n: int
    metrics: Mapping[str, MetricError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Predictions of all runs of a file against what was measured."""

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]
    """(run id, reason)."""

    @property
    def overall(self) -> Mapping[str, MetricError]:
        """Errors over all runs."""
        return errors_by_metric(self.rows)

    @property
    def groups(self) -> list[Group]:
        """Errors by GPU, engine and model."""
        keys = dict.fromkeys((r.run.gpu, r.run.engine, r.run.model) for r in self.rows)
        groups = []
        for gpu, engine, model in keys:
            rows = [
                r
                for r in self.rows
                if (r.run.gpu, r.run.engine, r.run.model) == (gpu, engine, model)
            ]
            groups.append(
                Group(
                    gpu=gpu, engine=engine, model=model, n=len(rows), metrics=errors_by_metric(rows)
                )
            )
        return groups

    @property
    def loads(self) -> list[tuple[str, int, Mapping[str, MetricError]]]:
        """Kind of load, number of runs, and errors of the metrics that intervals are judged by."""
        kinds = sorted({row.regime for row in self.rows})
        by_kind = {kind: [row for row in self.rows if row.regime == kind] for kind in kinds}
        return [
            (
                kind,
                len(rows),
                {name: e for name, e in errors_by_metric(rows).items() if name in JUDGED},
            )
            for kind, rows in by_kind.items()
        ]

    def drift_lines(self, source: str, *, calibration: str = "") -> list[str]:
        """Say which runs the calibration in force no longer explains, by engine.

        Args:
            source: Runs as `planner calibrate` takes them.
            calibration: As the runs were validated with.
        """
        first = {row.run.engine: row.run for row in reversed(self.rows)}
        watched = [
            Watched(
                engine=row.run.engine,
                engine_version=row.run.engine_version,
                drifts=tuple(row.drifts()),
            )
            for row in self.rows
        ]
        return drift_lines(
            watched,
            lambda engine: run_calibration(first[engine], calibration).seen_versions,
            source=source,
        )

    def without_front_end_limited(self) -> Validation:
        """Return the runs whose rate the GPU, not the front end, decides."""
        kept = tuple(row for row in self.rows if row.front_end_share < FRONT_END_LIMITED)
        return replace(self, rows=kept)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "overall": {"n": len(self.rows), "metrics": _errors_to_json(self.overall)},
            "groups": [
                {
                    "gpu": group.gpu,
                    "engine": group.engine,
                    "model": group.model,
                    "n": group.n,
                    "metrics": _errors_to_json(group.metrics),
                }
                for group in self.groups
            ],
            "loads": [
                {"load": kind, "n": count, "metrics": _errors_to_json(errors)}
                for kind, count, errors in self.loads
            ],
            "rows": [
                {
                    "run_id": row.run.run_id,
                    "predicted": dict(row.predicted),
                    "measured": dict(row.run.measured),
                    "front_end_limited": row.front_end_share >= FRONT_END_LIMITED,
                }
                for row in self.rows
            ],
            "skipped": [{"run_id": run_id, "reason": reason} for run_id, reason in self.skipped],
        }


def validate(
    path: str | Path,
    *,
    calibration: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Predict every measured run of a file and compare.

    Args:
        path: Runs, one JSON object a line.
        calibration: A calibration file; `shipped`; empty for the user's own where there is one.
        progress: Called with (runs done, in all).

    Raises:
        ProfileError: The file is missing or damaged. A run that cannot be predicted is
            skipped, with the reason.
    """
    rows, skipped = [], []
    runs = list(read_runs(path))
    for number, (run, run_id, reason) in enumerate(runs):
        if progress is not None:
            progress(number, len(runs))
        if run is None:
            skipped.append((run_id, reason))
            continue
        try:
            rows.append(predict_run(run, calibration=calibration))
        except PlannerError as error:
            skipped.append((run_id, str(error)))
    return Validation(rows=tuple(rows), skipped=tuple(skipped))


def predict_run(run: MeasuredRun, *, calibration: str = "") -> Row:
    """Predict one run from its configuration, workload and lengths alone.

    Raises:
        PlannerError: Unknown GPU, model or engine, or an incomplete workload.
    """
    return predict_run_with(run, run_calibration(run, calibration))


def predict_run_with(run: MeasuredRun, calibration: Calibration) -> Row:
    """The same under a calibration at hand."""
    evaluator, deployment = run_evaluator(run, calibration)
    capacity = run.protocol == "capacity"
    demand = None if capacity else run_demand(run, evaluator.load)
    prediction = predict_deployment(evaluator, deployment, demand)
    names = CAPACITY_METRICS if capacity else tuple(prediction.metrics)
    metrics = {name: prediction.metrics[name] for name in names}
    return Row(
        run=run,
        predicted={name: metric.value for name, metric in metrics.items()},
        intervals={name: metric.interval_90 for name, metric in metrics.items()},
        front_end_share=0.0 if capacity else prediction.front_end_share,
        regime=run.protocol if capacity else prediction.regime,
    )


def outcome_of_run(run: MeasuredRun, calibration: Calibration) -> Outcome:
    """Predict the values of a serving run alone, as a fit needs them many times."""
    evaluator, deployment = run_evaluator(run, calibration)
    return outcome_of(evaluator, deployment, run_demand(run, evaluator.load))


def run_evaluator(run: MeasuredRun, calibration: Calibration) -> tuple[Evaluator, Deployment]:
    """Return what predicts a run, and the deployment that served it."""
    if run.protocol == "capacity":
        return capacity_evaluator(run, calibration)
    return _evaluator_under(run, calibration, run.load())


def capacity_evaluator(run: MeasuredRun, calibration: Calibration) -> tuple[Evaluator, Deployment]:
    """Return what predicts the memory of a run, whatever it was to serve, and its deployment."""
    return _evaluator_under(run, calibration, _capacity_load(run))


def _evaluator_under(
    run: MeasuredRun, calibration: Calibration, load: Load
) -> tuple[Evaluator, Deployment]:
    model, gpu = _model(run.model), _gpu(run.gpu)
    config = as_run(run.engine_config(), run.engine)
    config = _with_unstated_limits(run, config, load)
    evaluator = Evaluator(model=model, gpu=gpu, calibration=calibration, load=load, slo={})
    return evaluator, run.deployment(config, gpu)


def _with_unstated_limits(run: MeasuredRun, config: EngineConfig, load: Load) -> EngineConfig:
    """Set the limits that a run does not state as its engine must have set them."""
    if not is_engine(run.engine):
        return config
    served = MeasuredLoad(
        model=_model(run.model),
        gpu=_gpu(run.gpu),
        mean_isl=load.isl.mean,
        mean_osl=load.osl.mean,
        longest_isl=0.0 if run.protocol == "capacity" else load.isl.maximum,
        concurrency=load.concurrency,
        is_offline=load.protocol is ArrivalMode.OFFLINE,
    )
    return find_engine(run.engine).with_unstated_limits(config, run.config, served)


def errors_by_metric(rows: Iterable[Row]) -> dict[str, MetricError]:
    """Return the error of every metric that some row has."""
    samples: dict[str, list[tuple[float, float, tuple[float, float]]]] = {}
    for row in rows:
        for name in row.scored():
            sample = (row.predicted[name], row.run.measured[name], row.intervals[name])
            samples.setdefault(name, []).append(sample)
    return {name: _metric_error(values) for name, values in sorted(samples.items())}


def _metric_error(samples: list[tuple[float, float, tuple[float, float]]]) -> MetricError:
    predicted = np.array([sample[0] for sample in samples])
    measured = np.array([sample[1] for sample in samples])
    low = np.array([sample[2][0] for sample in samples])
    high = np.array([sample[2][1] for sample in samples])
    error = predicted / measured - 1.0
    return MetricError(
        n=len(samples),
        mape_pct=float(np.mean(np.abs(error)) * 100),
        median_ape_pct=float(np.median(np.abs(error)) * 100),
        bias_pct=float(np.mean(error) * 100),
        coverage_90_pct=float(np.mean((low <= measured) & (measured <= high)) * 100),
        interval_90_rel_width_pct=float(np.mean((high - low) / predicted) * 100),
    )


def _errors_to_json(errors: Mapping[str, MetricError]) -> dict[str, dict[str, float]]:
    names = list(MetricError.__dataclass_fields__)
    return {
        metric: {name: round(getattr(error, name), 4) for name in names}
        for metric, error in errors.items()
    }


def _num_requests(run: MeasuredRun) -> float:
    workload = run.workload
    if workload.get("num_requests"):
        return float(workload["num_requests"])
    if "requests_file" in workload:
        return run.load().num_requests
    return 10.0 * float(workload.get("concurrency") or 0)


def _capacity_load(run: MeasuredRun) -> Load:
    """Nothing is served: only the longest sequence matters."""
    return Load(
        protocol=ArrivalMode.OFFLINE,
        isl=Lengths.fixed(float(run.workload.get("isl") or 1024)),
        osl=Lengths.fixed(float(run.workload.get("osl") or 128)),
        max_output_tokens=float(run.workload.get("osl") or 128),
    )


def run_calibration(run: MeasuredRun, path: str = "") -> Calibration:
    """Return what is known of a run's engine version on its GPU: shipped, or a user's own."""
    return calibration_from(run, files_in_force(path, gpu=_gpu(run.gpu).name, engine=run.engine))


def calibration_from(run: MeasuredRun, own: tuple[str, ...]) -> Calibration:
    """Return the same from files at hand, laid over what is shipped."""
    # A file that is written anew while a process lives is read anew.
    written = tuple(Path(file).stat().st_mtime if Path(file).exists() else 0.0 for file in own)
    return _calibration(run.gpu, run.engine, run.engine_version, own, written)


@cache
def _calibration(
    gpu: str, engine: str, version: str, own: tuple[str, ...], _written: tuple[float, ...]
) -> Calibration:
    return load_calibration(_gpu(gpu), engine, own, engine_version=version)


@cache
def _gpu(name: str) -> GpuSpec:
    return load_gpu(name)


@cache
def _model(name: str) -> ModelSpec:
    return load_model(name)
