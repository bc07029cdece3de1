"""What tokens_per_block does to each shipped workload: `python -m tests.bench.block_size`.

Beside it stands the rule of thumb by mean sequence length (below 128 tokens 32, below 512
64, below 1,024 128, else 256). The KV cache is pinned so small that it, not the batch
limit, decides: there a block size can matter. Attention itself costs the same at every size.
"""

from __future__ import annotations

from dataclasses import replace

from planner.prediction.evaluator import Slice
from planner.prediction.predict import single
from planner.prediction.simulation import simulate_deployment
from planner.question import load_problem
from planner.simulator import SimulationResult, offline_arrivals
from planner.workloads.demand import Demand, workload_demand
from planner.workloads.load import ArrivalMode
from planner.workloads.workload import list_workloads, load_workload
from tests.bench import run_bench

BLOCK_SIZES = (16, 32, 64, 128, 256)
REQUESTS = 1500
SEQUENCES = 64
"""Mean sequences that the pinned cache holds."""


def rule_of_thumb(mean_tokens: float) -> int:
    """Return the block size that the rule recommends."""
    for bound, size in ((128, 32), (512, 64), (1024, 128)):
        if mean_tokens < bound:
            return size
    return 256


def _burst(name: str) -> Demand:
    """As many requests of a workload at once, with its lengths and its shared prefix."""
    demand = workload_demand(load_workload(name), most_requests=REQUESTS)
    requests = demand.requests.at(demand.arrival_s.argsort(kind="stable")[:REQUESTS])
    return replace(
        demand,
        protocol=ArrivalMode.OFFLINE,
        requests=requests,
        arrival_s=offline_arrivals(len(requests)),
        concurrency=0,
        has_steady_state=False,
    )


def run_workload(name: str) -> tuple[float, dict[int, SimulationResult]]:
    """Return a workload's mean sequence length, and what each block size gives."""
    problem, demand = load_problem(gpu="h100", workload=name), _burst(name)
    mean_tokens = float((demand.requests.isl + demand.requests.osl).mean())
    longest = int((demand.requests.isl + demand.requests.max_tokens).max())
    pinned = max(round(SEQUENCES * mean_tokens), 2 * longest)
    results = {}
    for size in BLOCK_SIZES:
        config = replace(
            problem.default_config,
            tokens_per_block=size,
            enable_chunked_prefill=True,
            capacity_scheduler_policy="MAX_UTILIZATION",
            kv_cache_max_tokens=pinned,
        )
        deployment = problem.deployment_of(config)
        memory = single(problem.evaluator.memory(Slice(base=deployment)))
        results[size] = simulate_deployment(problem.evaluator, deployment, memory, demand)
    return mean_tokens, results


def main() -> None:
    """Print throughput, waste and prefix hits by workload and block size."""
    for name in list_workloads():
        mean_tokens, results = run_workload(name)
        rates = {size: r.metrics.output_tok_per_s for size, r in results.items()}
        best = max(rates, key=lambda size: rates[size])
        thumb = rule_of_thumb(mean_tokens)
        lost = 100 * (1 - rates[thumb] / rates[best])
        print(  # noqa: T201  a benchmark's output
            f"{name}: {mean_tokens:.0f} tokens a sequence; best {best}, "
            f"rule of thumb {thumb}, {lost:.1f} % slower"
        )
        for size, result in results.items():
            usage = result.kv_usage()
            print(  # noqa: T201
                f"  {size:>4}: {rates[size]:>9,.0f} output tokens/s, waste "
                f"{100 * usage.waste_fraction:4.1f} %, prefix hits "
                f"{100 * result.prefix_hit_fraction:4.1f} %, paging saves "
                f"{100 * usage.contiguous_saving_fraction:4.1f} % of max_seq_len slots"
            )


if __name__ == "__main__":
    run_bench(main)
