"""`planner validate`."""

from __future__ import annotations

import click

from planner.cli.options import print_json, progress_bar


@click.command("validate")
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
            print_json({"groups": [error.to_json() for error in errors]})
        else:
            report.print_operator_errors(errors)
        return 0
    from planner.validation.validate import validate  # noqa: PLC0415

    with progress_bar("predicting runs") as progress:
        result = validate(str(runs), calibration=calibration, progress=progress)
    if as_json:
        print_json(result.to_json())
    else:
        report.print_validation(result)
    return 0
