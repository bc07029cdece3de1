"""A measurement as tables: what is seen now, and what was predicted beside what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cost_models.units import GIB
from planner.tui.live import Live, percentiles
from planner.tui.text import milliseconds, number

if TYPE_CHECKING:
    from executor.machine import GpuSample

BESIDE = (
    ("TTFT", "ttft_ms.mean"),
    ("TPOT", "tpot_ms.mean"),
    ("ITL99", "itl_ms.p99"),
    ("E2E", "e2el_ms.mean"),
    ("tok/s", "output_tok_per_s"),
    ("req/s", "request_per_s"),
)
"""(title, metric); short, for six columns beside the form on a small screen."""


def figures_table(live: Live) -> Table:
    """Return rates, latencies and the use of the KV cache as they are now."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    load = live.load
    if load is not None:
        table.add_row(
            "requests", f"{load.num_ended} of {load.num_sent} sent", f"{live.requests_per_s:.2f} /s"
        )
        table.add_row("tokens", f"{load.num_tokens:,}", f"{live.tokens_per_s:,.1f} /s")
    for name, values in (("TTFT", live.ttft_s), ("ITL", live.gap_s)):
        found = percentiles(tuple(values))
        if found:
            median, p99 = (milliseconds(1e3 * value) for value in found)
            table.add_row(f"{name} ms", f"P50 {median}", f"P99 {p99}")
    kv = live.kv_used_fraction
    table.add_row("KV cache", "not told by this engine" if kv is None else f"{100 * kv:.1f} % used")
    return table


def gpu_table(live: Live) -> Text | Table:
    """Return what each GPU says of itself, and which does not answer any more."""
    if not live.gpus:
        return Text("No GPU: memory, power and clocks are not measured.", style="dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("GPU", "memory GiB", "power W", "SM MHz", "°C", "busy %"):
        table.add_column(title, justify="right")
    for index, gpu in enumerate(live.gpus):
        if index in live.lost_gpus:
            table.add_row(str(index), Text("✗ does not answer", style="bold"))
        else:
            table.add_row(str(index), *_readings(gpu))
    return table


def _readings(gpu: GpuSample) -> list[str]:
    scaled = (
        (gpu.memory_used_bytes, 1 / GIB, 1), (gpu.power_w, 1.0, 0), (gpu.sm_clock_hz, 1e-6, 0),
        (gpu.temperature_c, 1.0, 0), (gpu.busy_fraction, 100.0, 0),
    )  # fmt: skip
    return ["–" if v is None else f"{v * factor:,.{digits}f}" for v, factor, digits in scaled]


def beside_table(
    runs: Sequence[Mapping[str, Any]], predicted: tuple[str, Mapping[str, float]]
) -> Group:
    """Return what was predicted, every run below it, and why runs failed."""
    from planner.workloads.measured import flat_metrics  # noqa: PLC0415

    gpu, values = predicted
    told = f"Mean ms, P99 of ITL; predicted for {gpu}" if values else "Mean ms, P99 of ITL"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=Text(told))
    table.title_justify = "left"
    table.add_column("")
    for title, _ in BESIDE:
        table.add_column(title, justify="right")
    if values:
        cells = [number(values[name]) if name in values else "–" for _, name in BESIDE]
        table.add_row("predicted", *cells, style="bold")
    failures = []
    for run in runs:
        measured = flat_metrics(run.get("measured") or {})
        name = str(run["run_id"]).rpartition("-")[2]
        if run["status"] != "ok":
            reason = str(run.get("error") or "").splitlines() or [""]
            failures.append(f"✗ run {name} {run['status']}: {reason[0]}")
            continue
        cells = [number(measured[n]) if n in measured else "–" for _, n in BESIDE]
        table.add_row(f"run {name}", *cells)
    return Group(table, *(Text(words) for words in failures))


def lost_words(gpus: Sequence[int]) -> str:
    """Say that GPUs vanished, and where to look."""
    names = ", ".join(str(index) for index in gpus)
    return f"GPU {names} does not answer NVML any more; see `nvidia-smi` and the kernel's log"
