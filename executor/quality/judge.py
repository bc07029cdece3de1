"""`planner quality`: how far a checkpoint is from the model that it was made from."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cost_models.errors import MeasurementError, ProfileError
from executor.models import INSTALL, load_tokenizer, pick_device
from executor.quality.checkpoint import Loaded, load
from executor.quality.kv_cache import int8_scales, new_cache
from executor.quality.statistics import (
    Estimate,
    Likelihoods,
    likelihood_estimates,
    text_estimates,
)
from executor.texts import read_texts

FEWEST_DOCUMENTS = 2
"""A bootstrap over one document has no spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRequest:
    """Which model is judged against which, on what."""

    model: Path
    against: Path
    data: Path
    kv_cache_dtype: str = "auto"
    """Of the judged model; `auto` is what its checkpoint asks for."""
    max_documents: int = 200
    max_tokens: int = 1024
    """Tokens of a document that are judged."""
    prompt_tokens: int = 64
    new_tokens: int = 64
    """Tokens of a generation; 0 leaves BLEU and ROUGE out."""
    generations: int = 64
    batch: int = 8
    """Documents in a pass; generations, whose logits are one token's, go four times as many."""
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """What was found."""

    model: str
    against: str
    quantization: str
    precision: str
    """The quantization as plans call it; empty where the checkpoint is not of our making."""
    kv_cache_dtype: str
    num_documents: int
    num_tokens: int
    num_generations: int
    estimates: Mapping[str, Estimate]
    """By metric; `perplexity_loss_pct` is the one that a plan takes."""
    wall_s: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "schema_version": 1,
            "model": self.model,
            "against": self.against,
            "quantization": self.quantization,
            "precision": self.precision,
            "kv_cache_dtype": self.kv_cache_dtype,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_generations": self.num_generations,
            "estimates": {name: one.to_json() for name, one in self.estimates.items()},
            "wall_s": round(self.wall_s, 2),
            "settings": dict(self.settings),
        }


def judge(request: QualityRequest) -> QualityReport:
    """Compare two model folders on a file of texts; the same seed gives the same report.

    Raises:
        PlannerError: Wrong input, or a package that is missing.
    """
    _check_packages(request)
    texts = read_texts(request.data)[: request.max_documents]
    if len(texts) < FEWEST_DOCUMENTS:
        raise ProfileError(
            f"{request.data}: {len(texts)} document", hint=f"give {FEWEST_DOCUMENTS} or more"
        )
    started = time.monotonic()
    device = pick_device(request.device)
    reference = load(request.against, device)
    judged = load(request.model, device)
    comparison = _Comparison(reference, judged, request, device)
    documents = comparison.tokenized(texts)
    likelihoods = comparison.likelihoods(documents)
    estimates = likelihood_estimates(likelihoods, seed=request.seed)
    generated, expected = comparison.generations(documents)
    if len(generated) >= FEWEST_DOCUMENTS:
        estimates |= text_estimates(generated, expected, seed=request.seed)
    return QualityReport(
        model=str(request.model),
        against=str(request.against),
        quantization=judged.quantization,
        precision=judged.precision,
        kv_cache_dtype=comparison.kv_cache_dtype,
        num_documents=len(likelihoods),
        num_tokens=int(sum(document.num_tokens for document in likelihoods)),
        num_generations=len(generated),
        estimates=estimates,
        wall_s=time.monotonic() - started,
        settings={
            name: getattr(request, name)
            for name in ("max_tokens", "prompt_tokens", "new_tokens", "seed")
        },
    )


def _check_packages(request: QualityRequest) -> None:
    """Say what is missing before minutes are spent.

    Raises:
        MeasurementError: A package is not installed.
    """
    needed = (
        "torch",
        "transformers",
        *(("sacrebleu", "rouge_score") if request.new_tokens else ()),
    )
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise MeasurementError(f"{name} is not installed", hint=INSTALL)


class _Comparison:
    """Two loaded models and the tokens that both see."""

    def __init__(
        self, reference: Loaded, judged: Loaded, request: QualityRequest, device: str
    ) -> None:
        self.reference, self.judged, self.request = reference, judged, request
        self.device = device
        self.tokenizer = load_tokenizer(request.against)
        asked = request.kv_cache_dtype
        self.kv_cache_dtype = judged.kv_cache_dtype if asked == "auto" else asked
        self.kv_scales = dict(judged.kv_scales)

    def tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every document that has something to predict.

        Raises:
            ProfileError: Too few have, or the tokenizer is not this model's.
        """
        limit = min(self.request.max_tokens, self.reference.model.config.max_position_embeddings)
        documents = [self.tokenizer(text)["input_ids"][:limit] for text in texts]
        documents = [ids for ids in documents if len(ids) > 1]
        if len(documents) < FEWEST_DOCUMENTS:
            raise ProfileError(f"{self.request.data}: documents of one token only")
        for loaded, folder in (
            (self.reference, self.request.against),
            (self.judged, self.request.model),
        ):
            if max(map(max, documents)) >= loaded.model.config.vocab_size:
                raise ProfileError(f"{folder}: its vocabulary is smaller than the tokenizer's")
        self._calibrate_int8(documents)
        return documents

    def _calibrate_int8(self, documents: Sequence[list[int]]) -> None:
        if self.kv_cache_dtype == "int8" and not self.kv_scales:
            tokens, _ = self._padded(documents[: self.request.batch])
            self.kv_scales = int8_scales(self.judged.model, tokens)

    def likelihoods(self, documents: Sequence[list[int]]) -> list[Likelihoods]:
        """Return what every document sums up to."""
        # Documents of like length share a batch; the order does not touch any sum.
        ordered = sorted(documents, key=len)
        return [
            one
            for batch in _batches(ordered, self.request.batch)
            for one in self._batch_likelihoods(batch)
        ]

    def _batch_likelihoods(self, batch: Sequence[list[int]]) -> Iterator[Likelihoods]:
        import torch  # noqa: PLC0415  optional

        tokens, lengths = self._padded(batch)
        with torch.inference_mode():
            reference = _log_probabilities(self.reference.model, tokens, {})
            cache = new_cache(self.judged.model, self.kv_cache_dtype, self.kv_scales)
            judged = _log_probabilities(self.judged.model, tokens, cache)
            targets = tokens[:, 1:, None]
            columns = {
                "nll_nats": -judged.gather(-1, targets)[..., 0],
                "reference_nll_nats": -reference.gather(-1, targets)[..., 0],
                "kl_nats": (reference.exp() * (reference - judged)).sum(-1),
                "top1_matches": (reference.argmax(-1) == judged.argmax(-1)).float(),
            }
            for row, length in enumerate(lengths):
                sums = {
                    name: float(column[row, : length - 1].double().sum())
                    for name, column in columns.items()
                }
                yield Likelihoods(num_tokens=length - 1, **sums)

    def _padded(self, batch: Sequence[list[int]]) -> tuple[Any, list[int]]:
        """Return a batch filled up on the right, where causal attention does not look."""
        import torch  # noqa: PLC0415  optional

        lengths = [len(ids) for ids in batch]
        rows = [ids + [0] * (max(lengths) - len(ids)) for ids in batch]
        return torch.tensor(rows, device=self.device), lengths

    def generations(self, documents: Sequence[list[int]]) -> tuple[list[str], list[str]]:
        """Return greedy continuations of the documents' beginnings by both models."""
        request = self.request
        prompts = [
            ids[: request.prompt_tokens] for ids in documents if len(ids) >= request.prompt_tokens
        ]
        generated: list[str] = []
        expected: list[str] = []
        if not request.new_tokens:
            return generated, expected
        for batch in _batches(prompts[: request.generations], 4 * request.batch):
            expected += self._continued(self.reference.model, batch, "bf16")
            generated += self._continued(self.judged.model, batch, self.kv_cache_dtype)
        return generated, expected

    def _continued(self, model: Any, prompts: Sequence[list[int]], kv: str) -> list[str]:
        import torch  # noqa: PLC0415  optional

        tokens = torch.tensor(prompts, device=self.device)
        with torch.inference_mode():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=self.request.new_tokens,
                pad_token_id=self.tokenizer.eos_token_id or 0,
                **new_cache(model, kv, self.kv_scales),
            )
        new = output[:, tokens.shape[1] :].tolist()
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]


def _log_probabilities(model: Any, tokens: Any, cache: Mapping[str, Any]) -> Any:
    """Return log probabilities of every next token, in FP32."""
    logits = model(tokens, use_cache=bool(cache), **cache).logits
    return logits[:, :-1].float().log_softmax(-1)


def _batches(rows: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
