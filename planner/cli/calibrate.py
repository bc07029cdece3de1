"""`planner calibrate`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from planner.cli.options import progress_bar


@click.command("calibrate")
@click.option(
    "--operators",
    "--microbench",
    "operators",
    default="",
    metavar="DIR",
    help="Folder of operator tables, as planner microbench writes them; fits one GPU's operators.",
)
@click.option("--gpu", default="", help="Whose rows of the operator tables are fitted.")
@click.option(
    "--runs",
    multiple=True,
    metavar="FILE",
    help="Measured runs; fits the engine's constants; repeatable.",
)
@click.option(
    "--store",
    multiple=True,
    metavar="FILE|URL",
    help="Store of planner measure, in place of --runs or beside it; repeatable.",
)
@click.option("--engine", default="trtllm", show_default=True, help="Whose runs are fitted.")
@click.option("--out", default="", metavar="FILE", help="Calibration file to write.")
@click.option(
    "--install",
    is_flag=True,
    help="Put it in force for plans, predictions and validations of yours.",
)
def calibrate_command(out: str, install: bool, gpu: str, operators: str, **given: Any) -> int:
    """Fit a calibration file from operator tables or measured runs."""
    if bool(operators) == bool(given["runs"] or given["store"]):
        raise click.UsageError("give --microbench DIR with --gpu, or --runs FILE, or --store URL")
    if operators and not gpu:
        raise click.UsageError("--microbench needs --gpu")
    if not out and not install:
        raise click.UsageError("say where the calibration goes: --out FILE, --install, or both")
    with tempfile.TemporaryDirectory(prefix="planner-calibrate-") as folder:
        candidate = Path(folder) / "candidate.json"
        name = (
            _fit_operators(operators, gpu, candidate) if operators else _fit_runs(candidate, given)
        )
        _keep(candidate, name=name, out=out, install=install)
    return 0


def _fit_operators(operators: str, gpu: str, candidate: Path) -> str:
    from cost_models.profile_io import load_gpu  # noqa: PLC0415  help must not wait
    from planner.calibration.operators import calibrate_operators  # noqa: PLC0415

    for line in calibrate_operators(operators, gpu=gpu, out=str(candidate)):
        click.echo(line)
    return f"gpus/{load_gpu(gpu).name}"


def _fit_runs(candidate: Path, given: Mapping[str, Any]) -> str:
    from cost_models.calibration_io import calibration_gpus  # noqa: PLC0415
    from planner.calibration.runs import calibrate_runs  # noqa: PLC0415
    from planner.own_calibrations import constants_name  # noqa: PLC0415

    paths, engine = list(given["runs"]), str(given["engine"])
    if given["store"]:
        from planner.measuring.measure import export_runs  # noqa: PLC0415

        for number, url in enumerate(given["store"]):
            paths.append(str(export_runs(url, str(candidate.parent / f"store{number}"))))
    with progress_bar("fitting") as progress:
        lines = calibrate_runs(paths, engine=engine, out=str(candidate), progress=progress)
    for line in lines:
        click.echo(line)
    return constants_name(engine, calibration_gpus(candidate))


def _keep(candidate: Path, *, name: str, out: str, install: bool) -> None:
    from planner.files import write_text  # noqa: PLC0415
    from planner.own_calibrations import put_in_force  # noqa: PLC0415

    if out:
        write_text(Path(out), candidate.read_text(encoding="utf-8"))
    if install:
        path = put_in_force(candidate, name=name)
        click.echo(f"In force: {path} (planner profiles diff says what changes)", err=True)
