"""Trains a small Llama-shaped model on the text that ships with Python, and a smaller draft of it.

Random weights have no quality to lose; these do. Seconds on a CPU for the tests, minutes on a GPU
(`tests/gpu/quality.py`). Nothing is downloaded: the corpus is the standard library, installed
packages and the documentation of the machine, without duplicates, split by the hash of each file.
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"
"""Tokens 0 and 1."""

SUFFIXES = (".py", ".md", ".rst", ".txt")
SMALLEST_FILE, LARGEST_FILE = 500, 200_000
"""Bytes."""

HELD_OUT = 20
"""One file in so many is held out."""

LARGEST_CORPUS = 60_000_000
"""Characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of a model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 4096
    max_position_embeddings: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long and how a model is trained."""

    seconds: float
    """Wall time; 0 trains for `steps` instead."""
    steps: int = 0
    batch: int = 16
    tokens: int = 512
    learning_rate: float = 6e-4
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents to train on, and others that no training sees."""

    train: list[str]
    held_out: list[str]


def machine_corpus(folders: list[Path] | None = None, *, limit: int = LARGEST_CORPUS) -> Corpus:
    """Read the text of this machine: same files, same corpus and same split."""
    train: list[str] = []
    held_out: list[str] = []
    seen: set[str] = set()
    size = 0
    for text in _texts(folders or _default_folders()):
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        (held_out if int(digest, 16) % HELD_OUT == 0 else train).append(text)
        size += len(text)
        if size >= limit:
            break
    return Corpus(train=train, held_out=held_out)


def _default_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    names = [paths["stdlib"], paths["purelib"], "/usr/share/doc", "/usr/lib/python3"]
    return [Path(name) for name in dict.fromkeys(names)]


def _texts(folders: list[Path]) -> Iterator[str]:
    """Yield all files, mixed: in the order of their names' hashes."""
    paths = {
        (hashlib.sha256(str(path.relative_to(folder)).encode()).digest(), path)
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
    }
    for _, path in sorted(paths):
        if not SMALLEST_FILE <= path.stat().st_size <= LARGEST_FILE:
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def train_tokenizer(corpus: Corpus, folder: Path, *, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer and save it as a fast one of transformers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train[:: max(len(corpus.train) // 2000, 1)], trainer)
    marks = {"bos_token": BEGIN, "eos_token": END, "pad_token": END}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    fast.save_pretrained(folder)
    return fast


def token_stream(corpus: Corpus, tokenizer: Any) -> Any:
    """Return all training documents as one row of token ids, each ended by `</s>`."""
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(corpus.train)
    return torch.tensor([token for document in encoded for token in (*document.ids, end)])


def train(shape: Shape, training: Training, stream: Any, folder: Path, *, device: str) -> float:
    """Train from random weights, save in BF16 and return the last loss in nats per token."""
    torch.manual_seed(training.seed)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).to(device)
    # Weights in FP32, arithmetic in BF16 on a GPU: updates are smaller than BF16 resolves.
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    loss_nats = math.nan
    for progress in _progress(training):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(training, progress)
        loss = _loss(model, _batch(stream, training, device), device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_nats = float(loss.detach()) if progress > 0.98 else loss_nats
    model.to(torch.bfloat16).save_pretrained(folder)
    return loss_nats


def _progress(training: Training) -> Iterator[float]:
    """Yield the share that is done before each step; the last one is near 1."""
    if training.steps:
        yield from (step / max(training.steps - 1, 1) for step in range(training.steps))
        return
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < training.seconds:
        yield elapsed / training.seconds


def _learning_rate(training: Training, progress: float) -> float:
    """Warm up over the first 2 %, then fall along a cosine to a twentieth."""
    warm = min(progress / 0.02, 1.0) if progress < 0.02 else 1.0
    return training.learning_rate * max(warm, 0.05) * (0.525 + 0.475 * math.cos(math.pi * progress))


def _batch(stream: Any, training: Training, device: str) -> Any:
    starts = torch.randint(len(stream) - training.tokens - 1, (training.batch,))
    rows = torch.stack([stream[start : start + training.tokens] for start in starts])
    return rows.to(device)


def _loss(model: Any, batch: Any, device: str) -> Any:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return model(batch, labels=batch, use_cache=False).loss


def write_documents(texts: list[str], path: Path, *, least: int = 400) -> Path:
    """Write documents of some length as JSONL, as `planner quality --data` reads them."""
    lines = [json.dumps({"text": text}) for text in texts if len(text) >= least]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


TINY = Shape(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=512,
    max_position_embeddings=256,
)
"""For tests: all sizes in multiples of 128, so that every scheme can be built."""


def tiny_model(folder: Path, *, steps: int = 60) -> Corpus:
    """Train the tests' model on parts of the standard library into a folder; return its corpus."""
    corpus = machine_corpus([Path(json.__file__).parent.parent], limit=800_000)
    tokenizer = train_tokenizer(corpus, folder, vocab_size=TINY.vocab_size)
    training = Training(seconds=0, steps=steps, batch=8, tokens=64, learning_rate=5e-3)
    train(TINY, training, token_stream(corpus, tokenizer), folder, device="cpu")
    return corpus


def add_outlier_channels(folder: Path, *, every: int = 16, factor: float = 16.0) -> None:
    """Give some channels large activations and small weights, without changing what is computed.

    Large models grow such channels (LLM.int8(), arXiv 2208.07339); they are what AWQ and
    SmoothQuant are about. A model trained for seconds has none.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight.data[::every] *= factor
            for reader in readers:
                reader.weight.data[:, ::every] /= factor
    model.save_pretrained(folder)
