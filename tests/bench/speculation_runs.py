"""Speed-up by drafting as measured and predicted: `python -m tests.bench.speculation_runs FILE`.

Runs of one GPU, model and number of clients are compared with those that do not draft. Predictions
take the acceptance that each run counted. Where requests restricted their tokens (flag
`token_mask`), what vLLM pays for that mask is taken off (`tests.bench.speculation_steps`) and both
are shown. A second file is a calibration of the runs' own host.
"""

from __future__ import annotations

import sys
from collections import defaultdict

import click
import numpy as np

from planner.validation.validate import Row, validate
from planner.workloads.measured import flat_metrics
from tests.bench import run_bench
from tests.bench.speculation_steps import is_masked, short_name, tpot_without_renewals_s

TPOT = "tpot_ms.mean"


def main() -> None:
    """Print a line for each model, scheme and number of clients."""
    groups: dict[tuple[str, str, int, str], list[Row]] = defaultdict(list)
    for row in validate(sys.argv[1], calibration="".join(sys.argv[2:])).rows:
        config, clients = row.run.engine_config(), int(row.run.workload["concurrency"])
        groups[row.run.gpu, row.run.model, clients, config.decoding_type].append(row)
    for (gpu, model, clients, scheme), rows in sorted(groups.items()):
        plain = groups[gpu, model, clients, ""]
        if not scheme or not plain:
            continue
        measured = _measured(plain) / _measured(rows)
        predicted = _predicted(plain) / _predicted(rows)
        tokens = np.mean([_tokens(row) for row in rows])
        spared = ""
        if any(is_masked(row.run) for row in rows):
            unmasked = _measured(plain) / _unmasked(rows)
            spared = (
                f" ({unmasked:.2f} without the mask: {100 * (predicted / unmasked - 1):+.0f} %)"
            )
        click.echo(
            f"{gpu:9} {short_name(model):22} {clients:3} {scheme:12}{tokens:.2f} tokens a draft  "
            f"measured {measured:.2f}  predicted {predicted:.2f}  "
            f"{100 * (predicted / measured - 1):+.0f} %{spared}"
        )


def _measured(rows: list[Row]) -> float:
    return float(np.mean([flat_metrics(row.run.measured)[TPOT] for row in rows]))


def _unmasked(rows: list[Row]) -> float:
    return float(np.mean([1e3 * tpot_without_renewals_s(row.run) for row in rows]))


def _predicted(rows: list[Row]) -> float:
    return float(np.mean([row.predicted[TPOT] for row in rows]))


def _tokens(row: Row) -> float:
    measured = row.run.measured
    return 1 + float(measured["num_accepted_draft_tokens"]) / float(measured["num_drafts"])


if __name__ == "__main__":
    run_bench(main)
