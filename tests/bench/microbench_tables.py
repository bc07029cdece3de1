"""How kernels timed by `planner microbench` compare with the shipped operator models.

`python -m tests.bench.microbench_tables profiles/microbench/h200_sxm`: for each family and dtype,
by how long a kernel takes, the median of model over measurement and the mean absolute error. The
models are fitted to TensorRT-LLM's kernels, the micro-benchmarks time torch's and Triton's, so
the difference is one of kernels as well as of models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cost_models.fitting.operators import FAMILIES, predict_table
from cost_models.profile_io import load_gpu
from cost_models.tables import latency_s, read_table
from engines.registry import load_calibration
from tests.bench import run_bench

TABLES = {
    "gemm": "gemm",
    "attention_context": "attention_prefill",
    "attention_decode": "attention_decode",
}
"""File name: operator family."""

CLASSES_S = ((0.0, 20e-6), (20e-6, 100e-6), (100e-6, np.inf))


def compared(folder: Path) -> Iterator[tuple[str, str, str, int, float, float]]:
    """Yield family, dtype, class of time, points, median of model over measured, MAPE in %."""
    for name, family in TABLES.items():
        table = read_table(folder / f"{name}.csv")
        gpu = load_gpu(str(table["system"][0]))
        ratio = predict_table(family, table, gpu, load_calibration(gpu).operators)
        measured_s = latency_s(table)
        ratio = ratio / measured_s
        dtypes = table[FAMILIES[family].dtype_column]
        for dtype in np.unique(dtypes):
            for low_s, high_s in CLASSES_S:
                chosen = (dtypes == dtype) & (measured_s >= low_s) & (measured_s < high_s)
                chosen &= np.isfinite(ratio)
                if chosen.any():
                    label = f"{low_s * 1e6:.0f} to {high_s * 1e6:.0f} us"
                    miss = np.abs(ratio[chosen] - 1).mean() * 100
                    middle = float(np.median(ratio[chosen]))
                    yield name, str(dtype), label, int(chosen.sum()), middle, float(miss)


def main() -> None:
    """Print the table."""
    title = ("family", "dtype", "kernel takes", "n", "model/measured", "MAPE %")
    print("{:20} {:10} {:16} {:>4} {:>14} {:>7}".format(*title))  # noqa: T201
    for family, dtype, label, count, middle, miss in compared(Path(sys.argv[1])):
        row = f"{family:20} {dtype:10} {label:16} {count:4} {middle:14.2f} {miss:7.1f}"
        print(row)  # noqa: T201


if __name__ == "__main__":
    run_bench(main)
