"""`planner tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cost_models.errors import MeasurementError
from planner.cli.options import (
    at_least,
    common_options,
    duration_s,
    measuring_options,
    print_json,
    searched_on,
    searching_options,
)

if TYPE_CHECKING:
    from planner.tuning.tune import Tuned, TuneRequest


@click.command("tune")
@common_options
@searching_options
@click.option(
    "--rate",
    type=float,
    default=None,
    help="Requests/s; default: the highest that the plan is predicted to serve.",
)
@click.option(
    "--time-budget",
    type=duration_s,
    default="20m",
    show_default=True,
    metavar="TIME",
    help="90s, 20m or 1h.",
)
@click.option(
    "--min-gain",
    default=0.01,
    show_default=True,
    help="Ends when measuring on is expected to gain less, as a share of the best.",
)
@click.option("--repeats", default=1, show_default=True, help="Runs of a configuration.")
@click.option("--seed", default=0, show_default=True, help="Hosts that share a study share it.")
@click.option(
    "--study", default="tune", show_default=True, help="Its name in the store, to resume and share."
)
@measuring_options
def tune_command(as_json: bool, **options: Any) -> int:
    """Measure the configurations that teach most, and find the best on real hardware."""
    from engines.registry import is_engine  # noqa: PLC0415
    from executor.backend import load_backend  # noqa: PLC0415
    from planner.tuning.tune import tune  # noqa: PLC0415  help must not wait

    served = load_backend(options["backend"]).engine
    if not _is_given("engine") and is_engine(served):
        options["engine"] = served
    result = tune(_tune_request(options))
    if as_json:
        print_json(result.to_json())
    else:
        _print_tuned(result, engine=options["engine"], store=options["store"])
    return 0 if result.best else MeasurementError.exit_status


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not ParameterSource.DEFAULT


def _tune_request(options: dict[str, Any]) -> TuneRequest:
    from planner.knobs import parse_assignments  # noqa: PLC0415
    from planner.measuring.request import MeasureRequest  # noqa: PLC0415
    from planner.question import PlanRequest  # noqa: PLC0415
    from planner.tuning.tune import TuneRequest  # noqa: PLC0415

    plan = PlanRequest(**searched_on(options))
    measure = MeasureRequest(
        backend=options["backend"],
        workload=options["workload"],
        model=options["model"],
        gpu=options["gpu"],
        rate_per_s=options["rate"],
        num_requests=options["num_requests"],
        random_weights=options["random_weights"],
        backend_options=parse_assignments(options["backend_options"], "--option"),
        store=options["store"],
        workdir=options["workdir"],
        repeats=at_least(options["repeats"], 1, "--repeats"),
        seed=options["seed"],
    )
    return TuneRequest(
        plan=plan,
        measure=measure,
        study=options["study"],
        time_budget_s=at_least(options["time_budget"], 1.0, "--time-budget"),
        smallest_gain=at_least(options["min_gain"], 0.0, "--min-gain"),
        said=lambda line: click.echo(line, err=True),
    )


def _print_tuned(result: Tuned, *, engine: str, store: str) -> None:
    for tried in result.tried:
        found = f"{tried.measured:10.4g}" if tried.measured is not None else f"{tried.failure:>10}"
        mark = "★" if result.best and tried.index == result.best.index else " "
        click.echo(f"{mark} measured {found}, predicted {tried.predicted:10.4g}  {tried.label}")
    click.echo(f"Ended: {result.reason}")
    if result.best:
        click.echo(f"Best for {result.objective}: {result.best.label}")
        click.echo(f"Learn from it: planner calibrate --store {store} --engine {engine} --install")
