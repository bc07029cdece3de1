"""`planner predict`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cost_models.errors import ConfigError
from planner.cli.options import (
    common_options,
    print_json,
    quality_limit_option,
    rate_progress,
    read_slo,
)

if TYPE_CHECKING:
    from planner.prediction.predict import Prediction


@click.command("predict")
@common_options
@click.option(
    "--set", "settings", multiple=True, metavar="KNOB=VALUE", help="Change a knob; repeatable."
)
@click.option(
    "--config",
    "config_file",
    default="",
    metavar="FILE",
    help="The engine's options as YAML (--config of trtllm-serve or vllm serve).",
)
@quality_limit_option("Most that the precisions may be expected to lose, in percent.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same requests.")
@click.option("--find-rate", is_flag=True, help="Find the highest rate that meets the SLO.")
@click.option(
    "--requests-out", default="", metavar="FILE", help="Write the simulated requests (JSONL)."
)
@click.option("--itl", is_flag=True, help="Add every gap between tokens to --requests-out.")
@click.option(
    "--timeline", default="", metavar="FILE", help="Write steps, queue and KV use for Perfetto."
)
def predict_command(  # noqa: PLR0913  one argument for each output
    *,
    as_json: bool,
    settings: tuple[str, ...],
    config_file: str,
    seed: int,
    find_rate: bool,
    requests_out: str,
    itl: bool,
    timeline: str,
    **options: Any,
) -> int:
    """Say what one configuration would do; without --set or --config, the engine's defaults.

    Exit status 1 says that it does not fit, refuses requests, or breaks a limit of the SLO or of
    quality.
    """
    from cost_models.profile_io import read_yaml_object  # noqa: PLC0415
    from engines.registry import find_engine  # noqa: PLC0415
    from planner.knobs import (  # noqa: PLC0415
        apply_settings,
        parse_assignments,
    )
    from planner.prediction.highest_rate import check_has_rate, highest_rate  # noqa: PLC0415
    from planner.prediction.predict import predict_deployment  # noqa: PLC0415
    from planner.question import check_runnable, load_problem  # noqa: PLC0415
    from planner.workloads.demand import workload_demand  # noqa: PLC0415

    options["slo"] = read_slo(options["slo"])
    problem = load_problem(**options)
    config = problem.default_config
    extra: dict[str, Any] = {"ignored_options": []}
    if config_file:
        engine = find_engine(options["engine"])
        given = read_yaml_object(Path(config_file))
        config, extra["ignored_options"] = engine.read_options(given, config)
    deployment = problem.deployment_of(config)
    deployment = apply_settings(deployment, parse_assignments(settings, "--set"))
    violations = check_runnable(problem, deployment.config)
    extra["limits"] = problem.evaluator.limits
    extra["not_deployable"] = [str(violation) for violation in violations]
    demand = workload_demand(problem.workload, seed=seed)
    with rate_progress(shown=not as_json) as progress:
        found = highest_rate(problem.evaluator, deployment, demand, progress=progress)
    evaluator = problem.evaluator
    if find_rate:
        check_has_rate(demand.protocol)
        extra["found_rate_per_s"] = found.rate_per_s
        if found.rate_per_s:
            evaluator, demand = (
                evaluator.at_rate(found.rate_per_s),
                demand.at_rate(found.rate_per_s),
            )
    prediction = predict_deployment(evaluator, deployment, demand)
    prediction = replace(prediction, highest_rate_per_s=found.rate_per_s)
    _write_simulation(prediction, requests_out=requests_out, itl=itl, timeline=timeline)
    if as_json:
        print_json(prediction.to_json() | extra)
    else:
        from planner.cli.report import print_prediction  # noqa: PLC0415

        print_prediction(prediction, engine=options["engine"], notes=extra)
    return 0 if prediction.feasible else 1


def _write_simulation(
    prediction: Prediction, *, requests_out: str, itl: bool, timeline: str
) -> None:
    """Write what was asked of the simulation behind a prediction."""
    if not requests_out and not timeline:
        return
    from planner.prediction.simulation_files import write_requests, write_timeline  # noqa: PLC0415

    if prediction.simulation is None:
        raise ConfigError("nothing was simulated: the configuration does not fit")
    if itl and prediction.config.speculates:
        raise ConfigError(
            "--itl knows no single gaps under speculation", hint="itl_ms holds their distribution"
        )
    if requests_out:
        write_requests(prediction.simulation, Path(requests_out), with_itl=itl)
    if timeline:
        write_timeline(prediction.simulation, Path(timeline))
