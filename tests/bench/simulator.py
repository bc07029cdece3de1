"""How fast the simulator is: `python -m tests.bench.simulator`.

Each case runs in a process of its own, so that wall time and peak memory are the case's.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from planner.prediction.evaluator import Slice
from planner.prediction.predict import single
from planner.prediction.simulation import simulate_deployment
from planner.question import load_problem
from planner.workloads.demand import Demand, workload_demand
from planner.workloads.workload import load_workload
from tests.bench import run_bench

AZURE = Path(__file__).parents[2].parent / "shared/traces/azure2023_AzureLLMInferenceTrace_conv.csv"
MILLION = 1_000_000
CASES = ("azure", "million")


def _demand(case: str, workload: str) -> Demand:
    if case == "azure":
        return workload_demand(load_workload(workload))
    chat = load_workload(workload)
    return workload_demand(
        replace(chat, arrival=replace(chat.arrival, num_requests=MILLION, rate_per_s=16.0)),
        most_requests=MILLION,
    )


def run_case(case: str) -> None:
    """Simulate one case and print its figures as JSON."""
    workload = str(AZURE) if case == "azure" else "chat"
    problem = load_problem(gpu="h100", workload=workload, model="llama-3.1-8b")
    config = replace(problem.default_config, enable_chunked_prefill=True)
    deployment = problem.deployment_of(config)
    memory = single(problem.evaluator.memory(Slice(base=deployment)))
    demand = _demand(case, workload)
    start, used = time.perf_counter(), time.process_time()
    result = simulate_deployment(problem.evaluator, deployment, memory, demand)
    simulated_s, processor_s = time.perf_counter() - start, time.process_time() - used
    p99 = result.metrics.ttft_s.p99
    print(  # noqa: T201  read by the parent process
        json.dumps(
            {
                "requests": len(demand),
                "steps": result.num_steps,
                "simulated_s": simulated_s,
                "processor_s": processor_s,
                "ttft_p99_s": p99,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


def main() -> None:
    """Run every case in a fresh process and print what it took."""
    for case in CASES:
        if case == "azure" and not AZURE.exists():
            print(f"{case:8} skipped: {AZURE.name} is not there")  # noqa: T201
            continue
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, case], capture_output=True, text=True, check=True
        )
        wall_s = time.perf_counter() - start
        found = json.loads(done.stdout)
        print(  # noqa: T201  a benchmark's output
            f"{case:8} {found['requests']:>9,} requests, {found['steps']:,} steps: "
            f"{found['requests'] / found['simulated_s']:,.0f} requests/s simulated "
            f"({found['requests'] / found['processor_s']:,.0f} a second of CPU), "
            f"{wall_s:.2f} s from process start, {found['peak_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    run_case(sys.argv[1]) if len(sys.argv) > 1 else run_bench(main)
