"""The ladder as a table: memory, speed and loss of every step, each number with its origin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from cost_models.units import GIB
from planner.ladder.ladder import WHOLE_REQUEST, Ladder, Step
from planner.text.lines import folded

MARKS = {"predicted": "p", "measured": "m", "published": "r"}

WIDTH = 140
"""Columns of the table; a terminal that is narrower wraps it."""

NOTE_WIDTH = 80
"""Columns of what is said below it."""

Column = tuple[str, str, float, str]

COLUMNS: tuple[Column, ...] = (
    ("weights GiB", "weight_bytes_per_gpu", 1 / GIB, "{:.3g}"),
    ("KV tokens", "kv_cache_tokens", 1.0, "{:,.0f}"),
    ("TTFT ms", "ttft_ms.mean", 1.0, "{:.1f}"),
    ("TPOT ms", "tpot_ms.mean", 1.0, "{:.2f}"),
    ("E2E ms", "e2el_ms.mean", 1.0, "{:,.0f}"),
    ("tokens/s", "output_tok_per_s", 1.0, "{:,.0f}"),
)
"""(title, metric, factor, format)."""

FEW_COLUMNS = tuple(column for column in COLUMNS if column[0] in ("weights GiB", "E2E ms"))
"""What a narrow screen has room for."""


def print_ladder(ladder: Ladder) -> None:
    """Print every step, what stopped the ladder, and the step to stay on."""
    console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    console.print(f"{ladder.model} on {ladder.gpu}, workload {ladder.workload}\n")
    console.print(steps_table(ladder))
    console.print()
    for line in ladder_lines(ladder):
        console.print(folded(line, NOTE_WIDTH))


def steps_table(ladder: Ladder, columns: Sequence[Column] = COLUMNS, *, gap: int = 2) -> Table:
    """Return every step with some of its figures, its speed-up and its loss; gaps in columns."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column("step", no_wrap=True)
    for title in (*(column[0] for column in columns), "speed-up", "loss %"):
        table.add_column(title, justify="right", no_wrap=True)
    first = next((step for step in ladder.steps if WHOLE_REQUEST in step.figures), None)
    for step in ladder.steps:
        cells = _cells(step, columns)
        table.add_row(_title(step), *cells, _speed_up(step, first), _loss(step))
    return table


def ladder_lines(ladder: Ladder) -> Iterator[str]:
    """Yield what the letters mean, the notes of each step, and the step to stay on."""
    yield "p predicted, m measured, r published for other models"
    yield "speed-up is of a whole request"
    for step in ladder.steps:
        yield from (f"  {step.rung.title}: {note}" for note in step.notes)
    if ladder.stopped_because:
        yield f"Stopped: {ladder.stopped_because}"
    if ladder.best:
        yield f"ServerLease on: {_title(ladder.best)} ({ladder.best.engine})"


def _title(step: Step) -> str:
    if step.rung.is_baseline or step.config.quantization == "bf16" == step.config.kv_cache_dtype:
        return step.rung.title
    kv = "" if step.config.kv_cache_dtype == "bf16" else f" + {step.config.kv_cache_dtype} KV"
    return f"{step.rung.title} ({step.config.quantization}{kv})"


def _cells(step: Step, columns: Sequence[Column]) -> list[str]:
    cells = []
    for _, metric, factor, form in columns:
        figure = step.figures.get(metric)
        cells.append(
            f"{form.format(figure.value * factor)} {MARKS[figure.origin]}" if figure else "–"
        )
    return cells


def _speed_up(step: Step, first: Step | None) -> str:
    """Return by what factor whole requests are faster than in the first step that runs."""
    if first is None or WHOLE_REQUEST not in step.figures:
        return "–"
    return f"{first.value(WHOLE_REQUEST) / step.value(WHOLE_REQUEST):.2f}x"


def _loss(step: Step) -> str:
    if step.loss is None:
        return "–"
    loss, over = step.loss, " OVER" if step.over_limit else ""
    if str(loss.provenance) not in MARKS:
        return f"{loss.loss_pct:.2f}{over}"
    low, high = loss.interval_90
    mark = MARKS[str(loss.provenance)]
    return f"{loss.loss_pct:.2f} ({low:.1f} to {high:.1f}) {mark}{over}"
