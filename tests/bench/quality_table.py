"""Losses of quantized checkpoints: `python -m tests.bench.quality_table docs/quality/h100.json`.

The file is what `python -m tests.gpu.quality` wrote: a small model, trained, quantized by every
scheme and judged beside itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from tests.bench import run_bench

SHOWN = ("perplexity_loss_pct", "kl_nats_per_token", "top1_agreement_pct", "bleu", "rougeL_pct")


def main() -> None:
    """Print a line for each case, the smallest loss first."""
    cases = json.loads(Path(sys.argv[1]).read_text())["cases"]
    click.echo(f"{'case':14}" + "".join(f"{name:>34}" for name in SHOWN))
    for name, case in sorted(cases.items(), key=lambda item: _loss(item[1])):
        if "estimates" not in case:
            click.echo(f"{name:14} {case.get('error', 'not judged')}")
            continue
        click.echo(f"{name:14}" + "".join(f"{_shown(case, metric):>34}" for metric in SHOWN))


def _loss(case: dict[str, Any]) -> float:
    estimates = case.get("estimates")
    return float(estimates["kl_nats_per_token"]["value"]) if estimates else float("inf")


def _shown(case: dict[str, Any], metric: str) -> str:
    estimate = case["estimates"][metric]
    low, high = estimate["interval_90"]
    return f"{estimate['value']:.4g} ({low:.4g} to {high:.4g})"


if __name__ == "__main__":
    run_bench(main)
