"""Prints the predicted speed-up of each way to draft over the number of clients.

Usage: `python -m tests.bench.speculation [GPU]`
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from planner import predict

CLIENTS = (1, 4, 16, 64, 128)

ACCEPTANCE = [0.8, 0.7, 0.6]

KINDS = ("NGram", "Eagle", "DraftTarget")


def workload_file(folder: Path, clients: int) -> str:
    """Write a closed loop of 512 tokens in and 256 out, and say how often drafts are right."""
    content = {
        "schema_version": 1,
        "name": "drafted",
        "model": "llama-3.1-8b",
        "arrival": {
            "process": "closed_loop",
            "concurrency": clients,
            "num_requests": max(8, 4 * clients),
        },
        "isl": 512,
        "osl": 256,
        "speculation": {kind: {"acceptance": ACCEPTANCE} for kind in KINDS},
    }
    path = folder / f"drafted-{clients}.json"
    path.write_text(json.dumps(content))
    return str(path)


def tpot_ms(gpu: str, engine: str, workload: str, kind: str = "") -> float:
    """Predict the mean TPOT, with three draft tokens or none."""
    settings = {"decoding_type": kind, "max_draft_len": str(len(ACCEPTANCE))} if kind else {}
    settings |= {"speculative_model": "llama-3.2-1b"} if kind else {}
    found = predict(gpu=gpu, engine=engine, workload=workload, settings=settings)
    return found.value("tpot_ms.mean")


def main() -> None:
    """Print a table row for each engine and way to draft."""
    gpu = sys.argv[1] if len(sys.argv) > 1 else "h200"
    with tempfile.TemporaryDirectory() as folder:
        workloads = [workload_file(Path(folder), clients) for clients in CLIENTS]
        for engine in ("trtllm", "vllm"):
            plain = [tpot_ms(gpu, engine, workload) for workload in workloads]
            for kind in KINDS:
                drafted = [tpot_ms(gpu, engine, workload, kind) for workload in workloads]
                gains = (f"{one / two:.2f}" for one, two in zip(plain, drafted, strict=True))
                sys.stdout.write(f"| {engine} {kind} | {' | '.join(gains)} |\n")


if __name__ == "__main__":
    main()
