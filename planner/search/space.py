"""The conditional space of configurations: which splits exist, and which limits within each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from cost_models.engine import EngineConfig
from cost_models.engine_rules import EngineRules
from cost_models.gpu import GpuSpec
from cost_models.model import ModelSpec
from planner.prediction.evaluator import INNER_KNOBS, Slice

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKEN_BUDGETS = (1024, 2048, 4096, 8192, 16384)
FRACTIONS = (0.8, 0.85, 0.9, 0.95)
STREAM_INTERVALS = (1, 2, 4, 10)
"""Tokens that a client gets at a time: fewer messages for the front end, longer gaps."""

DRAFTS: Mapping[str, str] = {
    "llama-3.1-8b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.3-70b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-405b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-0.6B",
    "qwen3-14b": "Qwen/Qwen3-0.6B",
    "qwen3-32b": "Qwen/Qwen3-0.6B",
    "qwen3-235b-a22b": "Qwen/Qwen3-1.7B",
}
"""Smaller models of the same tokenizer that can draft, by the target's profile."""

OUTER_KNOBS = (
    "quantization",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "moe_expert_parallel_size",
    "enable_attention_dp",
    "moe_backend",
    "num_replicas",
)
"""Knobs that decide how a model is split and stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Every configuration that may be tried, as splits and the inner knobs of each."""

    model: ModelSpec
    gpu: GpuSpec
    num_gpus: int
    rules: EngineRules
    base: EngineConfig
    """Holds what is not searched: `max_seq_len`, the engine's defaults, pinned knobs."""
    limits: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values that `--pin` and `--limit` allow, by knob."""

    def choices(self, knob: str) -> tuple[Any, ...]:
        """Return the values that a knob may take, as far as it does not hang on others."""
        if knob in self.limits:
            return self.limits[knob]
        return self._defaults(knob)

    def splits(self) -> Iterator[EngineConfig]:
        """Yield every legal way to split and store the model, inner knobs at their base."""
        for values in product(*(self.choices(knob) for knob in OUTER_KNOBS)):
            config = replace(self.base, **dict(zip(OUTER_KNOBS, values, strict=True)))
            if self._is_legal(config):
                yield config

    def screen(self, *, every_inner_knob: bool = False) -> Iterator[Slice]:
        """Yield the grid of each split: what the closed form screens before Optuna refines.

        Args:
            every_inner_knob: Cross all inner knobs, not only the ones that weigh most.
        """
        crossed = INNER_KNOBS if every_inner_knob else SCREENED_KNOBS
        varied = [knob for knob in crossed if knob not in OUTER_KNOBS]
        grid = list(product(*(self.choices(knob) for knob in varied)))
        for split in self.splits():
            columns = {knob: np.array([row[i] for row in grid]) for i, knob in enumerate(varied)}
            columns["cuda_graph_max_batch_size"] = self._graph_sizes(columns)
            rows = Slice(base=self._with_single_choices(split), columns=columns)
            yield _legal_rows(rows)

    def with_knobs(self, config: EngineConfig, **knobs: Any) -> EngineConfig:
        """Return a configuration with knobs changed; CUDA graphs cover its batch unless limited."""
        changed = replace(config, **knobs)
        graphs = self.limits.get("cuda_graph_max_batch_size", (changed.max_batch_size,))[0]
        return replace(changed, cuda_graph_max_batch_size=graphs)

    def speculating(self, config: EngineConfig) -> Iterator[EngineConfig]:
        """Yield a configuration with each way and length of drafting that may be tried."""
        for kind, rule in self.rules.speculation.items():
            draft = self._draft(kind)
            if kind not in self.limits.get("decoding_type", (kind,)) or draft is None:
                continue
            for length in self.limits.get("max_draft_len", rule.searched):
                changed = replace(
                    config, decoding_type=kind, max_draft_len=length, speculative_model=draft
                )
                if length and self._is_legal(changed):
                    yield changed

    def _draft(self, kind: str) -> str | None:
        """Return the draft's checkpoint, empty where the scheme needs none; None: nobody names one.

        A model that drafts alone is known for some targets; heads on top of one must be named.
        """
        if not self.rules.speculation[kind].needs_model:
            return ""
        named = self.limits.get("speculative_model", ("",))[0]
        return named or (DRAFTS.get(self.model.name) if kind == "DraftTarget" else None)

    def size(self) -> int:
        """Return how many configurations the whole grid holds."""
        inner = np.prod(
            [len(self.choices(knob)) for knob in INNER_KNOBS if knob not in OUTER_KNOBS]
        )
        return int(inner) * sum(1 for _ in self.splits())

    def _with_single_choices(self, split: EngineConfig) -> EngineConfig:
        """Take the one allowed value, or the first, of the inner knobs that the grid leaves out."""
        rest = [k for k in INNER_KNOBS if k not in OUTER_KNOBS and k in self.limits]
        return replace(split, **{knob: self.limits[knob][0] for knob in rest})

    def _graph_sizes(self, columns: Mapping[str, Any]) -> Any:
        """CUDA graphs cover the batch unless the user says otherwise."""
        if "cuda_graph_max_batch_size" in self.limits:
            only = self.limits["cuda_graph_max_batch_size"][0]
            return np.full(len(columns["max_batch_size"]), only)
        return columns["max_batch_size"].copy()

    def _is_legal(self, config: EngineConfig) -> bool:
        if config.num_gpus > self.num_gpus or not self._has_useful_size(config):
            return False
        return not self.rules.violations(config, model=self.model, gpu=self.gpu)

    def _has_useful_size(self, config: EngineConfig) -> bool:
        """Replicas either fill the GPUs or are as few as possible, unless the user limits them."""
        if "num_replicas" in self.limits:
            return True
        fills = config.num_gpus * 2 > self.num_gpus
        return fills or config.num_replicas == 1

    def _defaults(self, knob: str) -> tuple[Any, ...]:
        powers = tuple(2**i for i in range(4) if 2**i <= self.num_gpus)
        defaults: dict[str, tuple[Any, ...]] = {
            "tensor_parallel_size": powers,
            "pipeline_parallel_size": powers[:2],
            "num_replicas": powers,
            "moe_expert_parallel_size": powers if self.model.is_moe else (1,),
            "enable_attention_dp": (False, True)
            if self.model.uses_mla or self.model.is_moe
            else (False,),
            "max_batch_size": BATCH_SIZES,
            "max_num_tokens": TOKEN_BUDGETS,
            "free_gpu_memory_fraction": FRACTIONS,
            "enable_chunked_prefill": (True, False),
            "stream_interval": STREAM_INTERVALS,
            "enable_block_reuse": (self.base.enable_block_reuse,),
            "cuda_graph_max_batch_size": (self.base.cuda_graph_max_batch_size,),
        }
        if knob in defaults and knob not in self.rules.knobs:
            return defaults[knob]
        return self.rules.legal_values(knob, model=self.model, gpu=self.gpu)


SCREENED_KNOBS = (
    "max_batch_size",
    "max_num_tokens",
    "enable_chunked_prefill",
    "capacity_scheduler_policy",
)
"""Inner knobs that the screening grid crosses; the others are refined."""


def _legal_rows(rows: Slice) -> Slice:
    """Drop rows whose batch limit exceeds the token budget: a step could not hold the batch."""
    keep = rows.column("max_batch_size") <= rows.column("max_num_tokens")
    return Slice(base=rows.base, columns={k: v[keep] for k, v in rows.columns.items()})
