"""The command line: thin over `planner.api`. stdout is data, stderr is talk.

Exit status: 0 done, 1 no feasible plan, 2 wrong usage or profile, 3 hardware or
measurement, 130 interrupted. Nothing heavy is imported before a command runs, so that
help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cost_models.errors import ConfigError, PlannerError, ProfileError
from planner.cli.measure import COMMANDS

if TYPE_CHECKING:
    from planner.api import PlanRequest
    from planner.prediction.predict import Prediction

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

Command = Callable[..., int]


def main() -> None:
    """Run `planner`."""
    _run(planner)


def plan_main() -> None:
    """Run `plan`, the short name of `planner plan`."""
    _run(plan_command)


def _run(command: click.Command) -> None:
    """Run a command and turn every expected error into one line and an exit status."""
    try:
        status = command.main(standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message().replace("\n", " "), status=2)
    except PlannerError as error:
        _fail(str(error), status=error.exit_status)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", status=130)
    except BrokenPipeError:
        # The reader of our output went away: nothing is left to say, nor anyone to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror}", status=2)
    sys.exit(status or 0)


def _fail(message: str, *, status: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="trtllm-planner", prog_name="planner")
def planner() -> None:
    """Plan how to run a large language model on TensorRT-LLM, and check the plan."""


for command in COMMANDS:
    planner.add_command(command)


def _common_options(function: Any) -> Any:
    """Options that say what is served on what."""
    options = (
        click.option(
            "--gpu", required=True, help="GPU profile or alias (h100), a YAML file, or auto."
        ),
        click.option(
            "--workload", required=True, help="Shipped name, JSON file, or a trace (CSV, JSONL)."
        ),
        click.option(
            "--model",
            default="",
            help="Model name, config.json or folder; overrides the workload's.",
        ),
        click.option(
            "--engine",
            default="trtllm",
            show_default=True,
            help="Engine to plan for: trtllm or vllm.",
        ),
        click.option(
            "--slo",
            multiple=True,
            metavar="METRIC=LIMIT",
            help="For example ttft_ms.p99=500; repeatable.",
        ),
        click.option(
            "--calibration", default="", metavar="FILE", help="A calibration of your own."
        ),
        click.option(
            "--json", "as_json", is_flag=True, help="Write JSON to stdout, and nothing else."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@planner.command("plan", context_settings=CONTEXT)
@_common_options
@click.option("--num-gpus", default=1, show_default=True, help="GPUs at hand, up to one node of 8.")
@click.option(
    "--objective", default="", help="goodput, throughput, latency or cost; default: the workload's."
)
@click.option("--pin", multiple=True, metavar="KNOB=VALUE", help="Fix a knob; repeatable.")
@click.option("--limit", multiple=True, metavar="KNOB=A,B,C", help="Restrict a knob; repeatable.")
@click.option("--trials", default=120, show_default=True, help="Optuna trials after the screening.")
@click.option("--time-budget", default=10.0, show_default=True, help="Seconds for the search.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same plan.")
@click.option(
    "--storage", default="", metavar="URL", help="Optuna storage, to keep and resume the study."
)
@click.option(
    "--usd-per-hour", type=float, default=None, help="Your price of one GPU for one hour."
)
@click.option(
    "--out", default="", metavar="DIR", help="Write plan.json and the TensorRT-LLM files here."
)
def plan_command(as_json: bool, out: str, **options: Any) -> int:
    """Recommend a configuration for a workload on a GPU, with the reasons."""
    from planner.api import plan_problem, requested_problem  # noqa: PLC0415  help must not wait

    request = _plan_request(options)
    problem = requested_problem(request)
    with _progress("searching", shown=not as_json) as progress:
        result = plan_problem(problem, replace(request, progress=progress))
    if out:
        from planner.plans.artifacts import write_plan_files  # noqa: PLC0415

        write_plan_files(result, problem=problem, folder=Path(out), seed=request.seed)
    if as_json:
        _print_json(result.to_json())
    else:
        from planner.cli.report import print_plan  # noqa: PLC0415

        print_plan(result, gpu=request.gpu, workload=request.workload)
        if out:
            click.echo(f"Wrote the plan and its TensorRT-LLM files to {out}", err=True)
    return 0 if result.status == "feasible" else 1


@planner.command("predict", context_settings=CONTEXT)
@_common_options
@click.option(
    "--set", "settings", multiple=True, metavar="KNOB=VALUE", help="Change a knob; repeatable."
)
@click.option(
    "--config",
    "config_file",
    default="",
    metavar="FILE",
    help="TensorRT-LLM YAML (--config of trtllm-serve).",
)
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
    """Say what one configuration would do; without --set or --config, the engine's defaults."""
    from planner.api import check_runnable, load_problem, options_file  # noqa: PLC0415
    from planner.knobs import (  # noqa: PLC0415
        apply_settings,
        config_from_options,
        parse_assignments,
    )
    from planner.prediction.predict import predict_config  # noqa: PLC0415
    from planner.prediction.simulation import workload_demand  # noqa: PLC0415

    options["slo"] = _slo(options["slo"])
    problem = load_problem(**options)
    config = problem.default_config
    extra: dict[str, Any] = {"ignored_options": []}
    if config_file:
        config, extra["ignored_options"] = config_from_options(options_file(config_file), config)
    config = apply_settings(config, parse_assignments(settings, "--set"))
    violations = check_runnable(problem, config)
    extra["not_deployable"] = [str(violation) for violation in violations]
    demand = workload_demand(problem.workload, seed=seed)
    if find_rate:
        from planner.prediction.find_rate import find_rate as find  # noqa: PLC0415

        found = find(problem.evaluator, config, demand)
        extra["found_rate_per_s"] = found.rate_per_s
        prediction = found.prediction
    else:
        prediction = predict_config(problem.evaluator, config, demand)
    _write_simulation(prediction, requests_out=requests_out, itl=itl, timeline=timeline)
    if as_json:
        _print_json(prediction.to_json() | extra)
    else:
        from planner.cli.report import print_prediction  # noqa: PLC0415

        print_prediction(prediction, notes=extra)
    return 0 if prediction.fits else 1


def _write_simulation(
    prediction: Prediction, *, requests_out: str, itl: bool, timeline: str
) -> None:
    """Write what was asked of the simulation behind a prediction."""
    if not requests_out and not timeline:
        return
    from planner.prediction.simulation_files import write_requests, write_timeline  # noqa: PLC0415

    if prediction.simulation is None:
        raise ConfigError("nothing was simulated: the configuration does not fit")
    if requests_out:
        write_requests(prediction.simulation, Path(requests_out), with_itl=itl)
    if timeline:
        write_timeline(prediction.simulation, Path(timeline))


@planner.command("validate", context_settings=CONTEXT)
@click.argument("runs", required=False)
@click.option(
    "--operators",
    default="",
    metavar="FILE",
    help="Operator table (CSV or parquet) instead of runs.",
)
@click.option("--calibration", default="", metavar="FILE", help="A calibration of your own.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout, and nothing else.")
def validate_command(runs: str | None, operators: str, calibration: str, as_json: bool) -> int:
    """Predict every measured run of a file (or operator of a table) and print the error."""
    if bool(runs) == bool(operators):
        raise click.UsageError("give a runs file, or --operators FILE")
    from planner.cli import report  # noqa: PLC0415

    if operators:
        from planner.validation.operators import validate_operators  # noqa: PLC0415

        errors = validate_operators(operators)
        if as_json:
            _print_json({"groups": [error.to_json() for error in errors]})
        else:
            report.print_operator_errors(errors)
        return 0
    from planner.validation.validate import validate  # noqa: PLC0415

    with _progress("predicting runs") as progress:
        result = validate(str(runs), calibration=calibration, progress=progress)
    if as_json:
        _print_json(result.to_json())
    else:
        report.print_validation(result)
    return 0


@planner.command("calibrate", context_settings=CONTEXT)
@click.option(
    "--operators",
    default="",
    metavar="DIR",
    help="Folder of operator tables; fits one GPU's operators.",
)
@click.option("--gpu", default="", help="Whose rows of the operator tables are fitted.")
@click.option(
    "--runs",
    multiple=True,
    metavar="FILE",
    help="Measured runs; fits the engine's constants; repeatable.",
)
@click.option("--engine", default="trtllm", show_default=True, help="Whose runs are fitted.")
@click.option("--out", required=True, metavar="FILE", help="Calibration file to write.")
def calibrate_command(
    operators: str, gpu: str, runs: tuple[str, ...], engine: str, out: str
) -> int:
    """Fit a calibration file from operator tables or measured runs."""
    if bool(operators) == bool(runs):
        raise click.UsageError("give --operators DIR with --gpu, or --runs FILE")
    if operators:
        if not gpu:
            raise click.UsageError("--operators needs --gpu")
        from planner.calibration.operators import calibrate_operators  # noqa: PLC0415

        summary = calibrate_operators(operators, gpu=gpu, out=out)
    else:
        from planner.calibration.runs import calibrate_runs  # noqa: PLC0415

        with _progress("fitting") as progress:
            summary = calibrate_runs(runs, engine=engine, out=out, progress=progress)
    for line in summary:
        click.echo(line)
    return 0


@planner.command("tui", context_settings=CONTEXT)
@click.option("--gpu", default="", help="GPU profile or alias (h100), a YAML file, or auto.")
@click.option("--model", default="", help="Model name, config.json or folder.")
@click.option("--workload", default="", help="Shipped name, JSON file, or a trace (CSV, JSONL).")
@click.option("--num-gpus", type=click.IntRange(1, 8), default=None, help="GPUs at hand.")
def tui_command(gpu: str, model: str, workload: str, num_gpus: int | None) -> int:
    """Plan in the terminal: recommendation, what-if, profiles and measured runs."""
    from planner.tui import run  # noqa: PLC0415  help must not wait

    return run(gpu=gpu, model=model, workload=workload, num_gpus=str(num_gpus or ""))


@planner.group("profiles", context_settings=CONTEXT)
def profiles_group() -> None:
    """List, show and check profiles of GPUs, models and workloads."""


@profiles_group.command("list")
def profiles_list() -> int:
    """List every shipped profile."""
    from planner.cli.report import print_profiles  # noqa: PLC0415

    print_profiles()
    return 0


@profiles_group.command("show")
@click.argument("name")
def profiles_show(name: str) -> int:
    """Print one profile file."""
    click.echo(_shipped_file(name).read_text(encoding="utf-8"), nl=False)
    return 0


@profiles_group.command("check")
@click.argument("file")
def profiles_check(file: str) -> int:
    """Read a profile file as the planner would, and say what it holds."""
    from cost_models.profile_io import load_gpu, load_model  # noqa: PLC0415
    from planner.workloads.workload import load_workload  # noqa: PLC0415

    path = Path(file)
    if not path.exists():
        raise ProfileError(f"{file}: no such file")
    if path.suffix in (".yaml", ".yml"):
        click.echo(f"{file}: GPU {load_gpu(file).title}")
    elif path.suffix in (".csv", ".jsonl") or "arrival" in path.read_text(errors="replace"):
        click.echo(f"{file}: workload {load_workload(file).title}")
    else:
        model = load_model(file)
        click.echo(f"{file}: model {model.name}, {model.architecture}, {model.num_layers} layers")
    return 0


def _plan_request(options: dict[str, Any]) -> PlanRequest:
    from planner.api import PlanRequest  # noqa: PLC0415
    from planner.knobs import parse_assignments  # noqa: PLC0415

    return PlanRequest(
        gpu=options["gpu"],
        workload=options["workload"],
        model=options["model"],
        engine=options["engine"],
        num_gpus=options["num_gpus"],
        slo=_slo(options["slo"]),
        objective=options["objective"],
        pins=parse_assignments(options["pin"], "--pin"),
        limits=parse_assignments(options["limit"], "--limit"),
        trials=_at_least(options["trials"], 0, "--trials"),
        time_budget_s=_at_least(options["time_budget"], 0.1, "--time-budget"),
        seed=options["seed"],
        storage=options["storage"],
        calibration=options["calibration"],
        usd_per_hour=options["usd_per_hour"],
    )


def _at_least(value: Any, least: float, option: str) -> Any:
    # `not >=` also refuses NaN.
    if not value >= least or value == float("inf"):
        raise click.UsageError(f"{option} {value}: it must be at least {least}")
    return value


def _slo(texts: tuple[str, ...]) -> dict[str, float]:
    from planner.knobs import parse_assignments  # noqa: PLC0415

    limits = {}
    for metric, text in parse_assignments(texts, "--slo").items():
        try:
            limits[metric] = float(text)
        except ValueError:
            raise click.UsageError(f"--slo {metric}={text}: the limit is not a number") from None
    return limits


@contextmanager
def _progress(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar with the time left on stderr while the block runs, if a person watches."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  help must not wait
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn(label), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, in_all: bar.update(task, completed=done, total=in_all)


def _shipped_file(name: str) -> Path:
    from importlib.resources import files  # noqa: PLC0415

    from cost_models.profile_io import list_gpus, list_models, load_gpu, load_model  # noqa: PLC0415
    from planner.workloads.workload import list_workloads  # noqa: PLC0415

    root = Path(str(files("profiles")))
    if name in list_workloads():
        return root / "workloads" / f"{name}.json"
    try:
        return root / "gpus" / f"{load_gpu(name).name}.yaml"
    except PlannerError:
        pass
    try:
        return root / "models" / f"{load_model(name).name}.json"
    except PlannerError:
        known = ", ".join([*list_gpus(), *list_models(), *list_workloads()])
        raise ProfileError(f"profile {name!r} is unknown", hint=f"known: {known}") from None


def _print_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))
