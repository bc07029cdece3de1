"""What each technique is worth, in percent, from tables of `planner microbench --techniques`.

`python -m tests.bench.technique_tables profiles/microbench/h200_sxm`: only ratios of kernels that
were timed side by side on one GPU. The attention and INT4 kernels are this project's own, so they
say what a form of the cache or of the weights makes possible, not what an engine's kernel does
with it; GEMMs and fused attention are those that torch ships.
"""

from __future__ import annotations

import csv
import re
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

PAGES = ("16", "32", "64", "128", "256")

ATTENTION_FORMS = ("unfused", "math", "efficient", "flash", "cudnn")

FUSED_FORMS = frozenset({"efficient", "flash", "cudnn"})


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
    for names, each in longer(rows, column, base, lambda row: (row[column], *group(row))).items():
        spread = f"{min(each):+.1f} to {max(each):+.1f}" if len(each) > 1 else ""
        yield (*names, str(len(each)), f"{median(each):+.1f}", spread)


def longer(
    rows: Iterable[Row], column: str, base: str, group: Callable[[Row], tuple[str, ...]]
) -> dict[tuple[str, ...], list[float]]:
    """Return by group, in order, the percent that each pair's first takes longer."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row, other in pairs(rows, column, base):
        found.setdefault(group(row), []).append(100 * (us(row) / us(other) - 1))
    return dict(sorted(found.items(), key=lambda item: [natural(name) for name in item[0]]))


def natural(text: str) -> tuple[list[int], str]:
    """Return a key that sorts numbers by size."""
    return [int(part) for part in re.findall(r"\d+", text)], text


def load(row: Row) -> str:
    """Return a cache's load as sequences × tokens."""
    return f"{row['batch_size']}×{row['kv_len']}"


def kv_cache(rows: list[Row]) -> Iterator[Line]:
    """Forms of the KV cache: percent longer than the form named in each title."""
    yield (
        "dtype",
        "layout",
        "best TB/s",
        *(f"page {size}" for size in PAGES),
        "(% over contiguous)",
    )
    by_page = longer(
        rows, "block_size", "0", lambda r: (r["kv_cache_dtype"], r["layout"], r["block_size"])
    )
    for dtype, layout in sorted({names[:2] for names in by_page}):
        alike = [r for r in rows if (r["kv_cache_dtype"], r["layout"]) == (dtype, layout)]
        rate = max(float(row["bytes_per_s"]) for row in alike) / 1e12
        cells = (f"{median(by_page[dtype, layout, size]):+.1f}" for size in PAGES)
        yield (dtype, layout, f"{rate:.2f}", *cells)
    yield ("layout", "dtype", "storage", "n", "% over NHD", "range over pages, loads")
    yield from compared(rows, "layout", "NHD", lambda row: (row["kv_cache_dtype"], storage(row)))
    yield ("dtype", "load", "storage", "n", "% over BF16", "range over layouts, pages")
    yield from compared(rows, "kv_cache_dtype", "bfloat16", lambda row: (load(row), storage(row)))


def storage(row: Row) -> str:
    """Return how a cache is stored; 64 tokens are a tile of the kernel."""
    size = int(row["block_size"])
    return ("pages from 64" if size >= 64 else "pages below 64") if size else "contiguous"


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
    odd = [row for row in rows if not row["n"] == row["k"] == str(ALIGNED)]
    for row in sorted(odd, key=lambda r: (r["dtype"], int(r["m"]), int(r["n"]), int(r["k"]))):
        n, k = int(row["n"]), int(row["k"])
        expected = aligned[row["dtype"], row["m"]] * n * k / ALIGNED**2
        side = "n" if n != ALIGNED else "k"
        percent = f"{100 * (us(row) / expected - 1):+.1f}"
        yield (side, row["dtype"], row["m"], str(n + k - 2 * ALIGNED), percent, "")


def fused_attention(rows: list[Row]) -> Iterator[Line]:
    """Attention: percent longer than the fastest of torch's fused kernels."""
    yield ("sequences×queries×keys", "fastest", "us", *ATTENTION_FORMS)
    loads = sorted({(r["batch_size"], r["query_len"], r["kv_len"]) for r in rows})
    for batch, queries, keys in loads:
        times = {
            r["form"]: us(r)
            for r in rows
            if (r["batch_size"], r["query_len"], r["kv_len"]) == (batch, queries, keys)
        }
        best = min(FUSED_FORMS & times.keys(), key=lambda form: times[form])
        cells = (f"{100 * (times[form] / times[best] - 1):+.1f}" for form in ATTENTION_FORMS)
        yield (f"{batch}×{queries}×{keys}", best, f"{times[best]:.1f}", *cells)


def fused_mlp(rows: list[Row]) -> Iterator[Line]:
    """A SwiGLU layer: percent longer than with gate and up merged and one activation kernel."""
    yield ("form", "tokens", "n", "% over fused", "")
    yield from compared(rows, "form", "fused", lambda row: (row["num_tokens"],))


def elementwise(rows: list[Row]) -> Iterator[Line]:
    """Element-wise chains: what fusing saves, in microseconds, the median over widths."""
    launch_s, bytes_per_s = fitted(rows)
    yield (f"by the formula with {1e6 * launch_s:.2f} us a kernel, {bytes_per_s / 1e12:.2f} TB/s",)
    yield ("chain", "tokens", "fused takes", "saved", "by the formula")
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row, fused in pairs(rows, "form", "fused"):
        before, after = traffic(row), traffic(fused)
        saved = Traffic(
            kernels=before.kernels - after.kernels,
            bytes_moved=before.bytes_moved - after.bytes_moved,
        )
        modelled_s = float(saved.seconds(launch_s=launch_s, bytes_per_s=bytes_per_s))
        times = (us(fused), us(row) - us(fused), 1e6 * modelled_s)
        found.setdefault((row["op"], row["num_tokens"]), []).append(times)
    for (chain, tokens), times_us in sorted(found.items(), key=lambda i: (i[0][0], int(i[0][1]))):
        yield (chain, tokens, *(f"{median(column):.1f}" for column in zip(*times_us, strict=True)))


def traffic(row: Row) -> Traffic:
    """Return what a chain launches and moves by the formula."""
    chain = {"norm_residual": norm_traffic, "swiglu": swiglu_traffic}[row["op"]]
    return chain(int(row["num_tokens"]), int(row["width"]), fused=row["form"] == "fused")


def fitted(rows: Iterable[Row]) -> tuple[float, float]:
    """Return seconds a kernel and bytes/s that fit all chains best, in relative error."""
    rows = list(rows)
    seconds = np.array([us(row) * 1e-6 for row in rows])
    parts = np.array([(traffic(row).kernels, float(traffic(row).bytes_moved)) for row in rows])
    (launch_s, byte_s), _ = nnls(parts / seconds[:, None], np.ones(len(rows)))
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
    tables = {name: read(Path(sys.argv[1]) / f"{name}.csv") for name in TABLES}
    if not any(tables.values()):
        sys.exit(f"{sys.argv[1]}: no table of a technique (planner microbench DIR --techniques)")
    for name, table in TABLES.items():
        rows = tables[name]
        if not rows:
            continue
        print(f"\n{name}, {rows[0]['device_name']}. {table.__doc__}")  # noqa: T201
        for line in table(rows):
            print("  " + "".join(f"{cell:20}" for cell in line).rstrip())  # noqa: T201


if __name__ == "__main__":
    main()
