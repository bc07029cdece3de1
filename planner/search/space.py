"""The conditional space of configurations: which splits exist, and which limits within each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from cost_models.cluster import Cluster
from cost_models.deployment import Deployment
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
)
"""Knobs that decide how a model is split and stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Every configuration that may be tried, as splits and the inner knobs of each."""

    model: ModelSpec
    rules: EngineRules
    base: Deployment
    """Holds what is not searched: `max_seq_len`, defaults, pinned knobs, the router."""
    limits: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values that `--pin` and `--limit` allow, by knob."""
    use_all: bool = False
    """Whether all GPUs of the cluster are to be taken; else as few as meet the SLO."""

    @property
    def cluster(self) -> Cluster:
        """The GPUs at hand."""
        return self.base.cluster

    @property
    def gpu(self) -> GpuSpec:
        """Their kind."""
        return self.base.cluster.gpu

    @property
    def num_gpus(self) -> int:
        """How many of them there are."""
        return self.base.cluster.num_gpus

    def choices(self, knob: str) -> tuple[Any, ...]:
        """Return the values that a knob may take, as far as it does not depend on others."""
        if knob in self.limits:
            return self.limits[knob]
        return self._defaults(knob)

    def splits(self) -> Iterator[EngineConfig]:
        """Yield every legal way to split and store the model, inner knobs at their base."""
        found = [config for config in self._split_configs() if self.server_counts(config)]
        if self.use_all:
            most = max((self._gpus_taken(config) for config in found), default=0)
            found = [config for config in found if self._gpus_taken(config) == most]
        yield from found

    def _split_configs(self) -> Iterator[EngineConfig]:
        for values in product(*(self.choices(knob) for knob in OUTER_KNOBS)):
            config = replace(self.base.config, **dict(zip(OUTER_KNOBS, values, strict=True)))
            if self._is_legal(config):
                yield config

    def _gpus_taken(self, config: EngineConfig) -> int:
        """GPUs of the most servers of a configuration that there is room for."""
        return self.server_counts(config)[-1] * config.num_gpus

    def server_counts(self, config: EngineConfig) -> tuple[int, ...]:
        """Return how many servers of a configuration may be deployed, ascending.

        Where all GPUs are to be used, only the most that there is room for.
        """
        most = self.num_gpus // config.num_gpus
        if "num_servers" in self.limits:
            return tuple(sorted(n for n in self.limits["num_servers"] if n <= most))
        counts = range(1, most + 1)
        return tuple(counts[-1:] if self.use_all else counts)

    def deployments(self, config: EngineConfig) -> Slice:
        """Return a configuration with every number of servers that may be deployed."""
        counts = np.array(self.server_counts(config), np.int64)
        return Slice(base=self.base.with_config(config), columns={"num_servers": counts})

    def screen(self, *, every_inner_knob: bool = False) -> Iterator[Slice]:
        """Yield the grid of each split: what the closed form screens before Optuna refines.

        Args:
            every_inner_knob: Cross all inner knobs, not only the ones that weigh most.
        """
        crossed = INNER_KNOBS if every_inner_knob else SCREENED_KNOBS
        varied = [knob for knob in crossed if knob not in OUTER_KNOBS]
        inner = [self.choices(knob) for knob in varied]
        for split in self.splits():
            grid = list(product(self.server_counts(split), *inner))
            names = ("num_servers", *varied)
            columns = {knob: np.array([row[i] for row in grid]) for i, knob in enumerate(names)}
            columns["cuda_graph_max_batch_size"] = self._graph_sizes(columns)
            base = self.base.with_config(self._with_single_choices(split))
            yield _legal_rows(Slice(base=base, columns=columns))

    def with_knobs(self, deployment: Deployment, **knobs: Any) -> Deployment:
        """Return a deployment with knobs changed; CUDA graphs cover its batch unless limited."""
        changed = deployment.with_knobs(**knobs)
        batch = changed.config.max_batch_size
        graphs = self.limits.get("cuda_graph_max_batch_size", (batch,))[0]
        return changed.with_knobs(cuda_graph_max_batch_size=graphs)

    def legal(self, deployment: Deployment, **knobs: Any) -> Deployment | None:
        """Return a deployment with knobs changed, or None where that may not be deployed."""
        changed = self.with_knobs(deployment, **knobs)
        config = changed.config
        if config.max_batch_size > config.max_num_tokens or changed.num_gpus > self.num_gpus:
            return None
        return changed if self._is_legal(config) else None

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
        return int(inner) * sum(len(self.server_counts(split)) for split in self.splits())

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
        if config.num_gpus > self.num_gpus:
            return False
        return not self.rules.violations(config, model=self.model, gpu=self.gpu)

    def _defaults(self, knob: str) -> tuple[Any, ...]:
        powers = tuple(2**i for i in range(4) if 2**i <= self.num_gpus)
        defaults: dict[str, tuple[Any, ...]] = {
            "tensor_parallel_size": powers,
            "pipeline_parallel_size": powers[:2],
            "num_servers": tuple(range(1, self.num_gpus + 1)),
            "router": (self.base.router,),
            "moe_expert_parallel_size": powers if self.model.is_moe else (1,),
            "enable_attention_dp": (False, True)
            if self.model.uses_mla or self.model.is_moe
            else (False,),
            "max_batch_size": BATCH_SIZES,
            "max_num_tokens": TOKEN_BUDGETS,
            "free_gpu_memory_fraction": FRACTIONS,
            "enable_chunked_prefill": (True, False),
            "stream_interval": STREAM_INTERVALS,
            "enable_block_reuse": (self.base.config.enable_block_reuse,),
            "cuda_graph_max_batch_size": (self.base.config.cuda_graph_max_batch_size,),
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
