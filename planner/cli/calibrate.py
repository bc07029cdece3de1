"""`planner calibrate`."""

from __future__ import annotations

import click

from planner.cli.options import progress_bar


@click.command("calibrate")
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

        with progress_bar("fitting") as progress:
            summary = calibrate_runs(runs, engine=engine, out=out, progress=progress)
    for line in summary:
        click.echo(line)
    return 0
