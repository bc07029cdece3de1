"""`planner diagnose`: what is wrong with a measured run, and why."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from planner.cli.options import (
    JSON_OPTION,
    NO_BREAK,
    STORE_OPTION,
    folded,
    print_json,
    quality_limit_option,
    read_slo,
)

if TYPE_CHECKING:
    from planner.diagnosis.finding import Diagnosis, RankedFinding, Remedy


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
    from planner.api import diagnose  # noqa: PLC0415  help must not wait

    limit = max_quality_loss_pct
    found = diagnose(run, store=store, slo=read_slo(slo), max_quality_loss_pct=limit)
    if as_json:
        print_json({"runs": [diagnosis.to_json() for diagnosis in found]})
        return 0
    width = shutil.get_terminal_size().columns
    for number, diagnosis in enumerate(found):
        lines = (folded(line, width) for line in _lines(diagnosis))
        click.echo("\n" * bool(number) + "\n".join(lines))
    return 0


def _lines(diagnosis: Diagnosis) -> Iterable[str]:
    yield f"{diagnosis.run_id}: {diagnosis.status}"
    if diagnosis.not_predicted:
        yield f"  not predicted: {diagnosis.not_predicted}"
    for complaint in diagnosis.complaints:
        yield f"  {'! ' if complaint.is_trouble else '  '}{complaint.words}"
    if diagnosis.is_well:
        yield "  Nothing wrong: no limit missed, nothing worse than predicted, no cause to name"
    for number, ranked in enumerate(diagnosis.findings, 1):
        yield from _finding_lines(number, ranked)
    for complaint in diagnosis.unexplained:
        yield f"  Not explained by anything in this run: {complaint.words}"
    if diagnosis.unexplained and diagnosis.status == "ok":
        yield "  If other runs agree, recalibrate: planner calibrate --runs FILE or --store URL"


def _finding_lines(number: int, ranked: RankedFinding) -> Iterable[str]:
    yield f"{number}. {ranked.finding.words} [{ranked.finding.cause}]"
    shares = [(share, c) for c, share in ranked.shares.items() if c.metric]
    if shares:
        accounts = ", ".join(f"{100 * share:.0f} % of {c.what}" for share, c in shares)
        yield f"   accounts for {accounts}"
    yield from (f"   - {line}" for line in ranked.finding.evidence)
    for remedy in ranked.finding.remedies:
        yield from _remedy_lines(remedy)


def _remedy_lines(remedy: Remedy) -> Iterable[str]:
    yield f"   > {remedy.action}{f' ({remedy.note})' if remedy.note else ''}"
    if remedy.effects:
        effects = (f"{e.metric} {e.before:,.4g} → {e.after:,.4g}" for e in remedy.effects)
        yield f"     {', '.join(effect.replace(' ', NO_BREAK) for effect in effects)}"
