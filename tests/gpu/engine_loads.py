"""Loads quantized checkpoints into vLLM and compares what it computes with `planner quality`.

    python3 -m tests.gpu.engine_loads --against DIR --checkpoints DIR --data FILE --out FILE.json

Each folder below `--checkpoints` is served, and asked for the log probability of every token of
the first documents of `--data`. The same tokens go through `executor.quality`, which reads the
folder in transformers and rounds what the engine would round. Written for each folder: the mean
negative log likelihood by both, the mean absolute difference of a token's log probability, and
what perplexity each says was lost beside the unquantized model; or why the engine refused it.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from executor.backend import ServerFailedError
from executor.models import load_tokenizer
from executor.process import ServerProcess, free_port
from executor.quality.checkpoint import load
from executor.texts import read_texts

Documents = Sequence[list[int]]


def main() -> None:
    """Serve, ask, compare, write; a folder that cannot be served is a result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--start-limit-s", type=float, default=180.0)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.against)
    texts = read_texts(options.data)[: options.documents]
    documents = [tokenizer(text)["input_ids"][: options.tokens] for text in texts]
    report: dict[str, Any] = {"engine": "vllm", "num_tokens": sum(len(d) - 1 for d in documents)}
    folders = [
        options.against,
        *sorted(p.parent for p in options.checkpoints.glob("*/config.json")),
    ]
    report["checkpoints"] = {}
    for folder in folders:
        found = _compared(folder, documents, options)
        report["checkpoints"][folder.name] = found
        options.out.write_text(json.dumps(_with_losses(report, folders[0].name), indent=1) + "\n")


def _compared(folder: Path, documents: Documents, options: argparse.Namespace) -> dict[str, Any]:
    ours = _by_planner(folder, documents)
    try:
        engine = _by_engine(folder, documents, options)
    except ServerFailedError as error:
        return {"nll_planner": float(ours.mean()), "refused": error.message, "log": error.log_tail}
    return {
        "nll_planner": float(ours.mean()),
        "nll_engine": float(engine.mean()),
        "mean_abs_difference_nats": float(np.abs(engine - ours).mean()),
    }


def _with_losses(report: dict[str, Any], against: str) -> dict[str, Any]:
    """Add what perplexity was lost beside the unquantized model, by each."""
    reference = report["checkpoints"][against]
    for found in report["checkpoints"].values():
        for who in ("planner", "engine"):
            if f"nll_{who}" in found and f"nll_{who}" in reference:
                lost = np.expm1(found[f"nll_{who}"] - reference[f"nll_{who}"])
                found[f"perplexity_loss_pct_{who}"] = 100 * float(lost)
    return report


def _by_planner(folder: Path, documents: Documents) -> np.ndarray[Any, Any]:
    model = load(folder, "cuda").model
    found = []
    for ids in documents:
        tokens = torch.tensor([ids], device="cuda")
        with torch.inference_mode():
            chances = model(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        found.append(-chances.gather(-1, tokens[:, 1:, None])[0, :, 0].cpu().numpy())
    del model
    torch.cuda.empty_cache()
    return np.concatenate(found)


def _by_engine(
    folder: Path, documents: Documents, options: argparse.Namespace
) -> np.ndarray[Any, Any]:
    port = free_port()
    server = ServerProcess(
        ["vllm", "serve", str(folder), "--port", str(port), "--enforce-eager",
         "--gpu-memory-utilization", "0.3", "--max-model-len", "1024"],
        log_path=options.out.parent / f"load-{folder.name}.log",
        environment={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip
    try:
        server.wait_healthy(port=port, limit_s=options.start_limit_s)
        return np.concatenate([_asked(port, str(folder), ids) for ids in documents])
    finally:
        server.stop()


def _asked(port: int, model: str, ids: list[int]) -> np.ndarray[Any, Any]:
    """Return the negative log likelihood of every token but the first."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        rows = json.load(answer)["choices"][0]["prompt_logprobs"]
    return np.array(
        [-row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)]
    )


if __name__ == "__main__":
    main()
