"""How fast a plan is: `python -m tests.bench.planning`."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

from planner.api import PlanRequest, load_problem, search_space
from tests.bench import run_bench

REPEATS = 5


def closed_form_rate() -> tuple[int, float]:
    """Return configurations evaluated and configurations/s over the whole grid of chat on H100."""
    request = PlanRequest(gpu="h100", workload="chat")
    problem = load_problem(gpu="h100", workload="chat")
    slices = list(search_space(problem, request).screen(every_inner_knob=True))
    start = time.perf_counter()
    for rows in slices:
        problem.evaluator.evaluate(rows)
    count = sum(len(rows) for rows in slices)
    return count, count / (time.perf_counter() - start)


def command_seconds(*arguments: str) -> float:
    """Return the median wall time of a `planner` command, start-up included."""
    program = "import sys; from planner.cli.main import main; sys.argv[0] = 'planner'; main()"
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL, check=False
        )
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print every figure."""
    count, rate = closed_form_rate()
    chat = ("plan", "--workload", "chat", "--json", "--gpu")
    rows = (
        ("closed form", f"{rate:,.0f} configurations/s over {count:,}"),
        ("planner --help", f"{command_seconds('--help'):.2f} s"),
        ("plan, chat on one H100", f"{command_seconds(*chat, 'h100'):.2f} s"),
        ("plan, chat on 8 H100", f"{command_seconds(*chat, 'h100', '--num-gpus', '8'):.2f} s"),
        ("peak memory", f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB"),
    )
    for name, value in rows:
        print(f"{name:24} {value}")  # noqa: T201  a benchmark's output


if __name__ == "__main__":
    run_bench(main)
