"""`planner validate`."""

from __future__ import annotations

from pathlib import Path

import click

from planner.cli.options import CALIBRATION_OPTION, JSON_OPTION, print_json, progress_bar


@click.command("validate")
@click.argument("runs", required=False)
@click.option(
    "--operators",
    default="",
    metavar="FILE",
    help="Operator table (CSV or parquet) instead of runs.",
)
@CALIBRATION_OPTION
@click.option(
    "--report",
    "report_folder",
    default="",
    metavar="DIR",
    help="Write a page with tables and plots here: report.html and report.md.",
)
@click.option(
    "--learning-curve",
    default="",
    metavar="FILE",
    help="JSON with errors by number of fitted runs, for the report.",
)
@JSON_OPTION
def validate_command(runs: str | None, operators: str, as_json: bool, **options: str) -> int:
    """Predict every measured run of a file (or operator of a table) and print the error."""
    if bool(runs) == bool(operators):
        raise click.UsageError("give a runs file, or --operators FILE")
    if options["learning_curve"] and not options["report_folder"]:
        raise click.UsageError("--learning-curve is shown in a report: give --report DIR")
    if operators:
        if options["report_folder"]:
            raise click.UsageError("--report is for runs, not for --operators")
        return _validate_operators(operators, as_json=as_json)
    return _validate_runs(str(runs), as_json=as_json, **options)


def _validate_operators(operators: str, *, as_json: bool) -> int:
    from planner.cli import report  # noqa: PLC0415
    from planner.validation.operators import validate_operators  # noqa: PLC0415

    errors = validate_operators(operators)
    if as_json:
        print_json({"groups": [error.to_json() for error in errors]})
    else:
        report.print_operator_errors(errors)
    return 0


def _validate_runs(
    runs: str, *, calibration: str, report_folder: str, learning_curve: str, as_json: bool
) -> int:
    from planner.cli.report import print_validation  # noqa: PLC0415
    from planner.validation.validate import validate  # noqa: PLC0415

    if report_folder:
        from planner.validation.report import check_installed  # noqa: PLC0415

        check_installed()
    with progress_bar("predicting runs") as progress:
        result = validate(runs, calibration=calibration, progress=progress)
    drift = result.drift_lines(f"--runs {runs}", calibration=calibration)
    content = result.to_json() | {"drift": drift}
    if report_folder:
        from planner.validation.report import make_report, write_report  # noqa: PLC0415

        report = make_report(
            result,
            runs=runs,
            folder=report_folder,
            calibration=calibration,
            learning_curve=learning_curve,
        )
        written = write_report(report, Path(report_folder))
        content |= {"report": report.to_json()}
        click.echo(f"Wrote {written[-1]} and {written[-2]}", err=True)
    if as_json:
        print_json(content)
    else:
        print_validation(result)
        for line in drift:
            click.echo(line)
    return 0
