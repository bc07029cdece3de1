"""How close the simulator is to loads that its constants have not seen.

    python -m tests.bench.simulator_accuracy RUNS.jsonl [--fit-on h200_vllm_bf16_c1,...]

Fits the engine's constants on a few closed-loop runs and predicts all others of the file.
Takes about a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np

from planner.calibration.fit import calibrated, fit_constants
from planner.validation.validate import predict_run_with
from planner.workloads.measured import MeasuredRun, read_runs
from tests.bench import run_bench

FIT_ON = "h200_vllm_bf16_c1,h200_vllm_bf16_c8,h200_vllm_bf16_c32"

METRICS = (
    "tpot_ms.mean", "output_tok_per_s", "e2el_ms.p50", "e2el_ms.p99", "ttft_ms.mean",
    "ttft_ms.p50", "ttft_ms.p99", "itl_ms.p99",
)  # fmt: skip


def main() -> None:
    """Print the error of every run and metric in percent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs")
    parser.add_argument("--fit-on", default=FIT_ON)
    arguments = parser.parse_args()
    runs = [run for run, _, _ in read_runs(arguments.runs) if run is not None]
    seen = [run for run in runs if run.run_id in arguments.fit_on.split(",")]
    values = fit_constants(seen).values
    print(f"{'left out':34}" + "".join(f"{name:>17}" for name in METRICS))  # noqa: T201
    rows = [_errors(run, values) for run in runs if run not in seen and run.protocol != "capacity"]
    print(f"{'mean of absolute errors':34}" + _cells(np.abs(rows).mean(axis=0)))  # noqa: T201


def _errors(run: MeasuredRun, values: Mapping[str, float]) -> list[float]:
    row = predict_run_with(run, calibrated(run, values))
    errors = [100 * (row.predicted[name] / run.measured[name] - 1) for name in METRICS]
    print(f"{run.run_id:34}" + _cells(errors))  # noqa: T201
    return errors


def _cells(values: list[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    return "".join(f"{value:>+17.1f}" for value in values)


if __name__ == "__main__":
    run_bench(main)
