"""How fast a plan is: `python -m tests.bench.planning`.

Wall times are medians, processor times the least of all repeats: other work on the machine
changes the first at will, the second less.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

from planner.question import PlanRequest, load_problem, search_space
from planner.workloads.workload import list_workloads
from tests.bench import run_bench

REPEATS = 3


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


def command_seconds(*arguments: str) -> tuple[float, float]:
    """Return median wall and least processor time of a `planner` command, start-up included.

    Modules are compiled already, as those of an installed package are.
    """
    program = "import sys; from planner.cli.main import main; sys.argv[0] = 'planner'; main()"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    wall_s, processor_s = [], []
    for _ in range(1 + REPEATS):
        start, used = time.perf_counter(), _children_s()
        subprocess.run(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.DEVNULL,
            env=environment,
            check=False,
        )
        wall_s.append(time.perf_counter() - start)
        processor_s.append(_children_s() - used)
    return statistics.median(wall_s[1:]), min(processor_s[1:])


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print every figure."""
    count, rate = closed_form_rate()
    commands: dict[str, tuple[str, ...]] = {"planner --help": ("--help",)}
    for workload in list_workloads():
        asked = ("plan", "--workload", workload, "--json", "--gpu", "h100")
        commands[f"plan, {workload} on one H100"] = asked
        commands[f"plan, {workload} on 8 H100"] = (*asked, "--num-gpus", "8")
    times = {name: command_seconds(*arguments) for name, arguments in commands.items()}
    rows = (
        ("closed form", f"{rate:,.0f} configurations/s over {count:,}"),
        *((name, f"{wall:.2f} s ({cpu:.2f} s of CPU)") for name, (wall, cpu) in times.items()),
        ("peak memory", f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB"),
    )
    for name, value in rows:
        print(f"{name:36} {value}")  # noqa: T201  a benchmark's output


if __name__ == "__main__":
    run_bench(main)
