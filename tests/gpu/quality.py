"""Measures on one GPU what every scheme and KV-cache dtype costs in quality.

    python3 -m tests.gpu.quality --work DIR --out FILE.json

Trains a small Llama-shaped model and a draft of it on the text of the machine (tests.small_model),
quantizes the model with every scheme, judges each with `planner quality` on held-out documents and
writes one JSON. The folders `target` and `draft` below DIR can be served afterwards.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cost_models.errors import MeasurementError
from executor.quality.judge import QualityRequest, judge
from executor.quantization.calibration import CalibrationSize
from executor.quantization.quantize import QuantizeRequest, quantize
from executor.quantization.schemes import SCHEMES
from tests.small_model import (
    TINY,
    Corpus,
    Shape,
    Training,
    machine_corpus,
    token_stream,
    train,
    train_tokenizer,
    write_documents,
)

TARGET = Shape(
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=4,
    vocab_size=8192,
)
DRAFT = Shape(
    hidden_size=512,
    intermediate_size=1280,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=8192,
)
SMALL = replace(TINY, max_position_embeddings=TARGET.max_position_embeddings)
"""For a try on a CPU."""

KV_CACHES = ("fp8", "int8", "nvfp4")
WORKERS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model to judge."""

    scheme: str
    """Empty for the unquantized model."""
    kv_cache_dtype: str = "auto"

    @property
    def name(self) -> str:
        """A folder's name."""
        parts = [self.scheme or "bf16"]
        return "-kv-".join(parts + ([] if self.kv_cache_dtype == "auto" else [self.kv_cache_dtype]))


def main() -> None:
    """Train, quantize, judge, write."""
    options = _options()
    started = time.monotonic()
    if options.device == "cuda":
        _compile_modelopt_kernels()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"device": _device(options.device), "seconds": {}}
    report |= _trained(work, options, report["seconds"])
    report["cases"] = _judged(work, options)
    report["seconds"]["all"] = round(time.monotonic() - started, 1)
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--draft-seconds", type=float, default=30.0)
    parser.add_argument("--small", action="store_true", help="a try on a CPU")
    return parser.parse_args()


def _compile_modelopt_kernels() -> None:
    """Let ModelOpt build its CUDA kernels while the model trains: about a minute of nvcc."""
    code = "from modelopt.torch.quantization.extensions import precompile; precompile()"
    subprocess.Popen([sys.executable, "-c", code], stdout=sys.stderr)


def _trained(work: Path, options: argparse.Namespace, seconds: dict[str, float]) -> dict[str, Any]:
    """Train target and draft, write the texts, and say how both fare."""
    target, draft = work / "target", work / "draft"
    clock = time.monotonic()
    corpus = machine_corpus(limit=2_000_000) if options.small else machine_corpus()
    shapes = (SMALL, SMALL) if options.small else (TARGET, DRAFT)
    tokenizer = train_tokenizer(corpus, target, vocab_size=shapes[0].vocab_size)
    tokenizer.save_pretrained(draft)
    stream = token_stream(corpus, tokenizer)
    seconds["corpus"] = round(time.monotonic() - clock, 1)
    _write_texts(corpus, work)
    size = {"batch": 4, "tokens": 64} if options.small else {"batch": 32, "tokens": 1024}
    losses = {}
    for folder, shape, limit in (
        (target, shapes[0], options.seconds),
        (draft, shapes[1], options.draft_seconds),
    ):
        training = Training(seconds=limit, learning_rate=1e-3, **size)
        losses[folder.name] = train(shape, training, stream, folder, device=options.device)
    return {
        "shapes": {"target": asdict(shapes[0]), "draft": asdict(shapes[1])},
        "training_tokens": len(stream),
        "last_loss_nats": losses,
    }


def _write_texts(corpus: Corpus, work: Path) -> None:
    write_documents(corpus.train[:400], work / "calibration.jsonl")
    write_documents(corpus.held_out[:200], work / "held_out.jsonl")


def _judged(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    cases = [Case(scheme="int4_gptq")]  # the slowest first
    cases += [Case(scheme=name) for name in SCHEMES if name != "int4_gptq"]
    cases += [Case(scheme="", kv_cache_dtype=kv) for kv in ("auto", *KV_CACHES)]
    cases += [Case(scheme="fp8", kv_cache_dtype="fp8"), Case(scheme="fp8", kv_cache_dtype="nvfp4")]
    context = multiprocessing.get_context("spawn")
    workers = 1 if options.small else WORKERS
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {case.name: pool.submit(judged, case, work, options) for case in cases}
        return {name: job.result() for name, job in jobs.items()}


def judged(case: Case, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize and judge one case, in a process of its own; an error is a result."""
    try:
        return _judged_case(case, work, options)
    except Exception:  # noqa: BLE001  the other cases shall go on
        return {"error": traceback.format_exc(limit=4)}


def _judged_case(case: Case, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    if options.device == "cpu":
        torch.set_num_threads(1)
    folder = work / "target"
    made: dict[str, Any] = {}
    if case.scheme:
        kv = "bf16" if case.kv_cache_dtype == "auto" else case.kv_cache_dtype
        folder = work / case.name
        request = QuantizeRequest(
            model=work / "target",
            scheme=case.scheme,
            calibration_data=work / "calibration.jsonl",
            out=folder,
            kv_cache_dtype=kv,
            size=CalibrationSize(num_samples=4, max_tokens=64)
            if options.small
            else CalibrationSize(num_samples=128, max_tokens=512),
            device=options.device,
        )
        try:
            made = {"quantized": quantize(request).to_json()}
        except MeasurementError as error:
            if case.scheme == "int4_gptq":  # its loop over columns takes minutes on a CPU
                raise
            # Without nvcc the scheme can still be made; the report says where.
            on_cpu = quantize(replace(request, device="cpu"))
            made = {"quantized": on_cpu.to_json() | {"on_cpu_because": str(error)}}
    small = {"max_documents": 4, "max_tokens": 64, "prompt_tokens": 16, "new_tokens": 4}
    report = judge(
        QualityRequest(
            model=folder,
            against=work / "target",
            data=work / "held_out.jsonl",
            kv_cache_dtype="auto" if case.scheme else case.kv_cache_dtype.replace("auto", "bf16"),
            device=options.device,
            **(small if options.small else {}),
        )
    )
    return report.to_json() | made


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _short(report: dict[str, Any]) -> dict[str, Any]:
    """What a person looks at first."""
    rows = {}
    for name, case in report["cases"].items():
        if "error" in case:
            rows[name] = case["error"].strip().splitlines()[-1]
            continue
        estimates = case["estimates"]
        rows[name] = {
            metric: [estimates[metric]["value"], *estimates[metric]["interval_90"]]
            for metric in ("perplexity_loss_pct", "kl_nats_per_token", "top1_agreement_pct", "bleu")
            if metric in estimates
        }
    return {k: v for k, v in report.items() if k != "cases"} | {"cases": rows}


if __name__ == "__main__":
    main()
