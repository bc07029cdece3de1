"""What each technique is worth, in percent, from tables of `planner microbench --techniques`.

`python -m tests.bench.technique_tables profiles/microbench/h200_sxm`: only ratios of kernels that
were timed side by side on one GPU. The attention and INT4 kernels are this project's own, so they
say what a form of the cache or of the weights makes possible, not what an engine's kernel does
with it; GEMMs and fused attention are those that torch ships.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import nnls

from cost_models.fusion import Traffic, norm_traffic, swiglu_traffic

Row = Mapping[str, str]
Line = tuple[str, ...]

NOT_KEYS = frozenset({"latency_us", "bytes_moved", "bytes_per_s"})

ALIGNED = 4096


def us(row: Row) -> float:
    """Return a row's time in microseconds."""
    return float(row["latency_us"])


def pairs(rows: Iterable[Row], column: str, base: str) -> Iterator[tuple[Row, Row]]:
    """Yield each row beside the one that differs in a column alone, where it has the base value."""

    def others(row: Row) -> tuple[str, ...]:
        return tuple(v for k, v in row.items() if k != column and k not in NOT_KEYS)

    rows = list(rows)
    bases = {others(row): row for row in rows if row[column] == base}
    for row in rows:
        if row[column] != base and others(row) in bases:
            yield row, bases[others(row)]


def compared(
    rows: Iterable[Row], column: str, base: str, group: Callable[[Row], tuple[str, ...]]
) -> Iterator[Line]:
    """Yield the groups of pairs with the median, least and most percent that they take longer."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row, other in pairs(rows, column, base):
        longer = 100 * (us(row) / us(other) - 1)
        found.setdefault((row[column], *group(row)), []).append(longer)
    for names, each in found.items():
        spread = f"{min(each):+.1f} to {max(each):+.1f}" if len(each) > 1 else ""
        yield (*names, str(len(each)), f"{median(each):+.1f}", spread)


def load(row: Row) -> str:
    """Return a cache's load as sequences × tokens."""
    return f"{row['batch_size']}×{row['kv_len']}"


def kv_cache(rows: list[Row]) -> Iterator[Line]:
    """Forms of the KV cache: percent longer than the form named first."""
    yield ("rate", "dtype", "load", "n", "best TB/s", "")
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        names = (row["kv_cache_dtype"], load(row))
        best[names] = max(best.get(names, 0.0), float(row["bytes_per_s"]) / 1e12)
    yield from (("", *names, "", f"{rate:.2f}", "") for names, rate in best.items())
    yield ("page", "dtype", "load", "n", "% over contiguous", "range over layouts")
    yield from compared(rows, "block_size", "0", lambda row: (row["kv_cache_dtype"], load(row)))
    yield ("layout", "dtype", "storage", "n", "% over NHD", "range over pages, loads")
    yield from compared(rows, "layout", "NHD", lambda row: (row["kv_cache_dtype"], storage(row)))
    yield ("dtype", "load", "storage", "n", "% over BF16", "range over layouts, pages")
    yield from compared(rows, "kv_cache_dtype", "bfloat16", lambda row: (load(row), storage(row)))


def storage(row: Row) -> str:
    """Return how a cache is stored."""
    return "paged" if row["block_size"] != "0" else "contiguous"


def kv_append(rows: list[Row]) -> Iterator[Line]:
    """Storing a token: percent longer than in place in a cache allocated before."""
    yield ("form", "load", "n", "% over preallocated", "")
    yield from compared(rows, "form", "preallocated", lambda row: (load(row),))


def int4_gemm(rows: list[Row]) -> Iterator[Line]:
    """INT4 weights: percent longer than the FP16 GEMM (below zero: faster)."""
    yield ("form", "m", "n", "% over FP16", "range over shapes")
    yield from compared(rows, "form", "half", lambda row: (row["m"],))


def alignment(rows: list[Row]) -> Iterator[Line]:
    """Odd sides of a GEMM: percent longer than aligned, the larger size counted in."""
    yield ("side", "dtype", "m", "past 4096", "%", "")
    aligned = {
        (row["dtype"], row["m"]): us(row) for row in rows if row["n"] == row["k"] == str(ALIGNED)
    }
    for row in rows:
        n, k = int(row["n"]), int(row["k"])
        if n * k != ALIGNED**2:
            expected = aligned[row["dtype"], row["m"]] * n * k / ALIGNED**2
            side = "n" if n != ALIGNED else "k"
            longer = f"{100 * (us(row) / expected - 1):+.1f}"
            yield (side, row["dtype"], row["m"], str(n + k - 2 * ALIGNED), longer, "")


def fused_attention(rows: list[Row]) -> Iterator[Line]:
    """Attention: percent longer than torch's flash kernel."""
    yield ("form", "sequences×queries×keys", "n", "% over flash", "")
    yield from compared(
        rows,
        "form",
        "flash",
        lambda row: (f"{row['batch_size']}×{row['query_len']}×{row['kv_len']}",),
    )


def fused_mlp(rows: list[Row]) -> Iterator[Line]:
    """A SwiGLU layer: percent longer than with gate and up merged and one activation kernel."""
    yield ("form", "tokens", "n", "% over fused", "")
    yield from compared(rows, "form", "fused", lambda row: (row["num_tokens"],))


def elementwise(rows: list[Row]) -> Iterator[Line]:
    """Element-wise chains: what fusing saves, in microseconds."""
    launch_s, bytes_per_s = fitted(rows)
    yield ("constants of the fused chains", f"{1e6 * launch_s:.2f} us a kernel",
           f"{bytes_per_s / 1e12:.2f} TB/s", "", "")  # fmt: skip
    yield ("chain", "tokens×width", "saved", "by the formula", "fused takes")
    for row, fused in pairs(rows, "form", "fused"):
        before, after = traffic(row), traffic(fused)
        kernels, moved = before.kernels - after.kernels, before.bytes_moved - after.bytes_moved
        modelled_us = 1e6 * (kernels * launch_s + float(moved) / bytes_per_s)
        size = f"{row['num_tokens']}×{row['width']}"
        yield (
            row["op"],
            size,
            f"{us(row) - us(fused):.1f}",
            f"{modelled_us:.1f}",
            f"{us(fused):.1f}",
        )


def traffic(row: Row) -> Traffic:
    """Return what a chain launches and moves by the formula."""
    chain = {"norm_residual": norm_traffic, "swiglu": swiglu_traffic}[row["op"]]
    return chain(int(row["num_tokens"]), int(row["width"]), fused=row["form"] == "fused")


def fitted(rows: Iterable[Row]) -> tuple[float, float]:
    """Return seconds a kernel and bytes/s that fit the fused chains best, in relative error."""
    fused = [row for row in rows if row["form"] == "fused"]
    seconds = np.array([us(row) * 1e-6 for row in fused])
    parts = np.array([(traffic(row).kernels, float(traffic(row).bytes_moved)) for row in fused])
    (launch_s, byte_s), _ = nnls(parts / seconds[:, None], np.ones(len(fused)))
    return float(launch_s), float(1 / byte_s)


TABLES: Mapping[str, Callable[[list[Row]], Iterator[Line]]] = {
    "kv_cache": kv_cache,
    "kv_append": kv_append,
    "int4_gemm": int4_gemm,
    "alignment": alignment,
    "fused_attention": fused_attention,
    "fused_mlp": fused_mlp,
    "elementwise": elementwise,
}


def read(path: Path) -> list[Row]:
    """Return a table's rows; none where there is no table."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Print every table that the folder has."""
    for name, table in TABLES.items():
        rows = read(Path(sys.argv[1]) / f"{name}.csv")
        if not rows:
            continue
        print(f"\n{name}, {rows[0]['device_name']}. {table.__doc__}")  # noqa: T201
        for line in table(rows):
            print("  " + "".join(f"{cell:20}" for cell in line).rstrip())  # noqa: T201


if __name__ == "__main__":
    main()
