"""`planner plan`, whose short name is `plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import (
    CONTEXT,
    at_least,
    common_options,
    print_json,
    progress_bar,
    quality_limit_option,
    searched_on,
    searching_options,
)

if TYPE_CHECKING:
    from planner.question import PlanRequest


@click.command("plan", context_settings=CONTEXT)
@common_options
@searching_options
@click.option(
    "--risk",
    default=0.0,
    metavar="P",
    help="The SLO must hold at the upper end of the interval that holds 1 - P of measurements.",
)
@quality_limit_option("Most that the precisions may be expected to lose, in percent.")
@click.option("--trials", default=120, show_default=True, help="Optuna trials after the screening.")
@click.option(
    "--time-budget",
    default=10.0,
    show_default=True,
    help="Seconds for search and simulation together.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same plan.")
@click.option(
    "--storage", default="", metavar="URL", help="Optuna storage, to keep and resume the study."
)
@click.option(
    "--usd-per-hour", type=float, default=None, help="Your price of one GPU for one hour."
)
@click.option(
    "--scheduling",
    is_flag=True,
    help="Simulate other orders of the waiting queue, also where that takes seconds.",
)
@click.option(
    "--out", default="", metavar="DIR", help="Write plan.json and the engine's files here."
)
def plan_command(as_json: bool, out: str, **options: Any) -> int:
    """Recommend a configuration for a workload on a GPU, with the reasons."""
    from planner.plans.make import plan_problem  # noqa: PLC0415  help must not wait
    from planner.question import requested_problem  # noqa: PLC0415  help must not wait

    request = _plan_request(options)
    problem = requested_problem(request)
    with progress_bar("searching", shown=not as_json) as progress:
        result = plan_problem(problem, replace(request, progress=progress))
    if out:
        from planner.plans.artifacts import write_plan_files  # noqa: PLC0415

        written = write_plan_files(result, problem=problem, folder=Path(out), seed=request.seed)
    if as_json:
        print_json(result.to_json())
    else:
        from planner.cli.report import print_plan  # noqa: PLC0415

        print_plan(result, gpu=request.gpu, workload=request.workload, engine=request.engine)
        if out:
            click.echo(f"Wrote {', '.join(written)} to {out}", err=True)
    return 0 if result.status == "feasible" else 1


def _plan_request(options: dict[str, Any]) -> PlanRequest:
    from planner.question import PlanRequest  # noqa: PLC0415

    return PlanRequest(
        **searched_on(options),
        risk=options["risk"],
        trials=at_least(options["trials"], 0, "--trials"),
        time_budget_s=at_least(options["time_budget"], 0.1, "--time-budget"),
        storage=options["storage"],
        usd_per_hour=options["usd_per_hour"],
        scheduling=options["scheduling"],
        max_quality_loss_pct=options["max_quality_loss_pct"],
    )
