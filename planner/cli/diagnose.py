"""`planner diagnose`: what is wrong with a measured run, and why."""

from __future__ import annotations

import click

from planner.cli.options import JSON_OPTION, STORE_OPTION, print_json, read_slo


@click.command("diagnose")
@click.argument("run")
@STORE_OPTION
@click.option(
    "--slo",
    multiple=True,
    metavar="METRIC=LIMIT",
    help="What the run had to keep, as ttft_ms.p99=500; repeatable.",
)
@click.option(
    "--max-quality-loss",
    type=click.FloatRange(min=0),
    default=None,
    metavar="PCT",
    help="Loss of quality in percent that was allowed beside the published checkpoint.",
)
@JSON_OPTION
def diagnose_command(
    run: str, store: str, slo: tuple[str, ...], max_quality_loss: float | None, as_json: bool
) -> int:
    """Say what is wrong with a measured run, why, and what turning a knob would do.

    RUN is an id of the store, a runs file, or FILE:ID or FILE:LINE for one of its runs.
    """
    from planner.api import diagnose  # noqa: PLC0415  help must not wait
    from planner.words import diagnosis_lines  # noqa: PLC0415

    found = diagnose(run, store=store, slo=read_slo(slo), max_quality_loss_pct=max_quality_loss)
    if as_json:
        print_json({"runs": [diagnosis.to_json() for diagnosis in found]})
        return 0
    for number, diagnosis in enumerate(found):
        click.echo("\n" * bool(number) + "\n".join(diagnosis_lines(diagnosis)))
    return 0
