"""`planner diagnose`: what is wrong with a measured run, and why."""

from __future__ import annotations

import shutil

import click

from planner.cli.options import (
    JSON_OPTION,
    STORE_OPTION,
    print_json,
    quality_limit_option,
    read_slo,
)
from planner.text.lines import folded


@click.command("diagnose")
@click.argument("run")
@STORE_OPTION
@click.option(
    "--slo",
    multiple=True,
    metavar="METRIC=LIMIT",
    help="What the run had to keep, as ttft_ms.p99=500; repeatable.",
)
@quality_limit_option(
    "Loss of quality in percent that was allowed beside the published checkpoint."
)
@JSON_OPTION
def diagnose_command(
    run: str, store: str, slo: tuple[str, ...], max_quality_loss_pct: float | None, as_json: bool
) -> int:
    """Say what is wrong with a measured run, why, and what turning a knob would do.

    RUN is an id of the store, a runs file, or FILE:ID or FILE:LINE for one of its runs.
    """
    from planner.diagnosis.diagnose import diagnose  # noqa: PLC0415  help must not wait
    from planner.text.lines import diagnosis_lines  # noqa: PLC0415

    limit = max_quality_loss_pct
    found = diagnose(run, store=store, slo=read_slo(slo), max_quality_loss_pct=limit)
    if as_json:
        print_json({"runs": [diagnosis.to_json() for diagnosis in found]})
        return 0
    width = shutil.get_terminal_size().columns
    for number, diagnosis in enumerate(found):
        lines = (folded(line, width) for line in diagnosis_lines(diagnosis))
        click.echo("\n" * bool(number) + "\n".join(lines))
    return 0
