"""`planner profiles`."""

from __future__ import annotations

from pathlib import Path

import click

from cost_models.errors import PlannerError, ProfileError
from planner.cli.options import JSON_OPTION, print_json


@click.group("profiles")
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


@profiles_group.command("diff")
@click.option("--gpu", default="h100", show_default=True, help="Whose operators are compared.")
@click.option("--engine", default="trtllm", show_default=True, help="Whose constants are compared.")
@click.option("--before", default="shipped", show_default=True, help="A calibration file.")
@click.option("--after", default="", help="Another; default: yours in force.")
@click.option("--plan", default="", metavar="FILE", help="plan.json to predict under both.")
@JSON_OPTION
def profiles_diff(plan: str, as_json: bool, **options: str) -> int:
    """Say in what two calibrations differ, and what that does to a plan."""
    from planner.calibration.diff import compare  # noqa: PLC0415  help must not wait

    found = compare(plan=plan, **options)
    if as_json:
        print_json(found.to_json())
    else:
        from planner.cli.report import print_calibration_diff  # noqa: PLC0415

        print_calibration_diff(found)
    return 0


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
