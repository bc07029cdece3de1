"""What several commands share: options, how they are read, progress and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


CALIBRATION_OPTION = click.option(
    "--calibration",
    default="",
    metavar="FILE",
    help="Instead of your calibration in force; `shipped` for none of yours.",
)

JSON_OPTION = click.option(
    "--json", "as_json", is_flag=True, help="Write JSON to stdout, and nothing else."
)

STORE_OPTION = click.option(
    "--store",
    default="sqlite:///planner-runs.db",
    show_default=True,
    metavar="URL",
    help="Where runs are kept: sqlite:///FILE or postgresql://USER@HOST/NAME.",
)


def quality_limit_option(what: str) -> Callable[[Any], Any]:
    """Return the option that limits the loss of quality, with what it does to a command."""
    return click.option(
        "--max-quality-loss",
        "max_quality_loss_pct",
        type=click.FloatRange(min=0),
        default=None,
        metavar="PCT",
        help=what,
    )


def duration_s(text: str) -> float:
    """Read a time option: 90, 90s, 20m or 1h."""
    units_s = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units_s else (text, "s")
    try:
        return float(number) * units_s[unit]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a time: write 90s, 20m or 1h") from None


def common_options(function: Any) -> Any:
    """Options that say what is served on what."""
    return _with_options(
        function,
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
        CALIBRATION_OPTION,
        JSON_OPTION,
    )


def searching_options(function: Any) -> Any:
    """Options that say among what is searched, and for what."""
    return _with_options(
        function,
        click.option(
            "--num-gpus",
            default=1,
            show_default=True,
            help="GPUs at hand, up to one node of 8; as few as meet the SLO are taken.",
        ),
        click.option("--use-all", is_flag=True, help="Take all GPUs at hand."),
        click.option(
            "--objective",
            default="",
            help="goodput, throughput, latency or cost; default: the workload's.",
        ),
        click.option("--pin", multiple=True, metavar="KNOB=VALUE", help="Fix a knob; repeatable."),
        click.option(
            "--limit", multiple=True, metavar="KNOB=A,B,C", help="Restrict a knob; repeatable."
        ),
    )


def measuring_options(function: Any) -> Any:
    """Options that say how an engine is brought up and loaded."""
    return _with_options(
        function,
        click.option("--backend", required=True, help="What runs it: `planner doctor` lists them."),
        click.option(
            "--requests", "num_requests", default=0, help="Requests of a run; default: workload."
        ),
        click.option("--random-weights", is_flag=True, help="Let the engine make up weights."),
        click.option(
            "--option",
            "backend_options",
            multiple=True,
            metavar="NAME=VALUE",
            help="What the backend alone knows, as url=http://HOST:PORT of `endpoint`; repeatable.",
        ),
        click.option(
            "--workdir",
            default="planner-measure",
            show_default=True,
            help="For logs and files made.",
        ),
        STORE_OPTION,
    )


def _with_options(function: Any, *options: Callable[[Any], Any]) -> Any:
    for option in reversed(options):
        function = option(function)
    return function


def searched_on(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `plan` and `tune` read alike, as arguments of a `PlanRequest`."""
    from planner.knobs import parse_assignments  # noqa: PLC0415

    same = ("gpu", "workload", "model", "engine", "num_gpus", "objective", "seed", "calibration")
    return {name: options[name] for name in same} | {
        "slo": read_slo(options["slo"]),
        "pins": parse_assignments(options["pin"], "--pin"),
        "limits": parse_assignments(options["limit"], "--limit"),
    }


def at_least(value: Any, least: float, option: str) -> Any:
    """Return a number of an option, or refuse it as wrong usage."""
    # `not >=` also refuses NaN.
    if not value >= least or value == float("inf"):
        raise click.UsageError(f"{option} {value}: it must be at least {least}")
    return value


def read_slo(texts: tuple[str, ...]) -> dict[str, float]:
    """Read `--slo METRIC=LIMIT`; limits in the metric's own unit."""
    from planner.knobs import parse_assignments  # noqa: PLC0415

    limits = {}
    for metric, text in parse_assignments(texts, "--slo").items():
        try:
            limits[metric] = float(text)
        except ValueError:
            raise click.UsageError(f"--slo {metric}={text}: the limit is not a number") from None
    return limits


@contextmanager
def progress_bar(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
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


@contextmanager
def rate_progress(*, shown: bool) -> Iterator[Callable[[int, float], None] | None]:
    """Tell on stderr which rate is simulated while the block runs, if a person watches."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  help must not wait

    with Console(stderr=True).status("simulating") as status:
        yield lambda done, rate: status.update(
            f"highest rate under the SLO: {rate:.4g} requests/s (simulation {done})"
        )


def print_json(data: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))
