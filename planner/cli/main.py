"""The command line: thin over `planner.api`. stdout is data, stderr is talk.

Exit status: 0 done, 1 no feasible plan, 2 wrong usage or profile, 3 hardware or
measurement, 130 interrupted. Nothing heavy is imported before a command runs, so that
help answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from cost_models.errors import PlannerError
from planner.cli import (
    calibrate,
    diagnose,
    ladder,
    measure,
    plan,
    predict,
    profiles,
    quality,
    tune,
    validate,
)
from planner.cli.options import CONTEXT


def main() -> None:
    """Run `planner`."""
    _run(planner)


def plan_main() -> None:
    """Run `plan`, the short name of `planner plan`."""
    _run(plan.plan_command)


def _run(command: click.Command) -> None:
    """Run a command and turn every expected error into one line and an exit status."""
    try:
        status = command.main(standalone_mode=False)
    except click.MissingParameter as error:
        _fail(_what_to_give(error), status=2)
    except click.ClickException as error:
        _fail(error.format_message().replace("\n", " "), status=2)
    except PlannerError as error:
        _fail(str(error), status=error.exit_status)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", status=130)
    except BrokenPipeError:
        end_without_reader()
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror}", status=2)
    sys.exit(status or 0)


def _what_to_give(error: click.MissingParameter) -> str:
    option = error.param
    if isinstance(option, click.Option) and option.help:
        return f"give {option.opts[-1]}: {option.help}"
    return error.format_message()


def end_without_reader() -> NoReturn:
    """End when the reader of our output went away: nothing is left to say, nor anyone to tell."""
    # The interpreter writes what is left in its buffer once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _fail(message: str, *, status: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="trtllm-planner", prog_name="planner")
def planner() -> None:
    """Plan how to run a large language model on TensorRT-LLM, and check the plan."""


@click.command("tui")
@click.option("--gpu", default="", help="GPU profile or alias (h100), a YAML file, or auto.")
@click.option("--model", default="", help="Model name, config.json or folder.")
@click.option("--workload", default="", help="Shipped name, JSON file, or a trace (CSV, JSONL).")
@click.option("--num-gpus", type=click.IntRange(1, 8), default=None, help="GPUs at hand.")
def tui_command(gpu: str, model: str, workload: str, num_gpus: int | None) -> int:
    """Plan in the terminal: recommendation, what-if, profiles and measured runs."""
    from planner.tui import run  # noqa: PLC0415  help must not wait

    return run(gpu=gpu, model=model, workload=workload, num_gpus=str(num_gpus or ""))


for command in (
    plan.plan_command,
    predict.predict_command,
    validate.validate_command,
    calibrate.calibrate_command,
    *measure.COMMANDS,
    diagnose.diagnose_command,
    tune.tune_command,
    ladder.ladder_command,
    quality.quantize_command,
    quality.quality_command,
    tui_command,
    profiles.profiles_group,
):
    planner.add_command(command)
