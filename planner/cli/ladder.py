"""`planner ladder`: a model step by step down in precision, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from planner.cli.options import (
    JSON_OPTION,
    STORE_OPTION,
    duration_s,
    print_json,
    quality_limit_option,
)


@click.command("ladder")
@click.option(
    "--model",
    default="tinyllama-1.1b",
    show_default=True,
    help="Model name, config.json, or a folder with weights, which can be quantized and judged.",
)
@click.option("--gpu", required=True, help="GPU profile or alias (h100), a YAML file, or auto.")
@click.option(
    "--workload", default="ladder", show_default=True, help="Shipped name, JSON file, or a trace."
)
@click.option(
    "--backend",
    default="trtllm",
    show_default=True,
    help="Engine of all steps but the first.",
)
@quality_limit_option("Loss of quality in percent beside BF16 at which the ladder stops.")
@click.option(
    "--calibration-data", default="", metavar="FILE", help="Text that quantization sees; builds."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Sequences of --calibration-data.",
)
@click.option("--data", default="", metavar="FILE", help="Held-out text; judges what is built.")
@click.option(
    "--documents", type=click.IntRange(min=2), default=200, show_default=True, help="Of --data."
)
@click.option("--out", default="", metavar="DIR", help="Write ladder.json and checkpoints here.")
@click.option(
    "--time-budget",
    "time_budget_s",
    type=duration_s,
    metavar="TIME",
    default="10m",
    show_default=True,
    help="For the measurements of each step: 90s, 20m or 1h.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same requests.")
@click.option(
    "--predict-only",
    is_flag=True,
    help="Measure nothing, also where the engine and the GPU are here.",
)
@STORE_OPTION
@JSON_OPTION
def ladder_command(as_json: bool, **options: Any) -> int:
    """Take a model from BF16 in transformers down to INT4 and a quantized KV cache.

    Each step is measured where its engine and the GPU are here, built where weights and text are
    given, else predicted; the table says which.
    """
    from planner.ladder.ladder import ladder  # noqa: PLC0415  help must not wait
    from planner.ladder.request import LadderRequest  # noqa: PLC0415  help must not wait

    say = None if as_json else lambda what: click.echo(what, err=True)
    found = ladder(LadderRequest(progress=say, **options))
    if options["out"]:
        path = Path(options["out"]) / "ladder.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(found.to_json())
    else:
        from planner.text.ladder_table import print_ladder  # noqa: PLC0415

        print_ladder(found)
    return 0 if found.best else 1
