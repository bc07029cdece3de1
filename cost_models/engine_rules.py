"""What an engine version can deploy: precision by GPU, legal values of its knobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cost_models.acceptance import PRIORS
from cost_models.engine import KNOBS, EngineConfig
from cost_models.errors import ConfigError
from cost_models.gpu import GpuSpec
from cost_models.model import ModelSpec
from cost_models.weights import check_divides

NATIVE_ONLY = ("w4a16_mxfp4", "w4a8_mxfp4_mxfp8")
"""Quantizations that exist only as a model's own published checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRule:
    """Where one precision runs."""

    sm: tuple[int, ...]
    """Compute capabilities, as 90 for 9.0."""
    deployable: bool
    source: str
    reason: str = ""
    """Why it is not deployable."""
    with_quantizations: tuple[str, ...] = ()
    """KV dtypes only: weight precisions that it needs; empty is any."""
    searched: bool = True
    """Whether the search offers it; what needs a checkpoint that nobody makes must be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnobRule:
    """Legal values of one knob."""

    values: tuple[Any, ...]
    source: str
    searched: tuple[Any, ...] = ()
    """Values that the search tries; empty is all."""
    mla_values: tuple[Any, ...] = ()
    """Legal values for MLA models; empty is all."""

    @property
    def words(self) -> str:
        """What is accepted, and who says so."""
        return f"accepted: {', '.join(map(str, self.values))} ({self.source})"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeBackendRule:
    """Expert kernels that serve some precisions on some GPUs."""

    quantizations: tuple[str, ...]
    sm: tuple[int, ...]
    backends: tuple[str, ...]
    """Preferred one first."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationRule:
    """One way to draft that an engine offers, in its own words."""

    name: str
    """How the engine spells it."""
    length_option: str
    """The option that takes `max_draft_len`."""
    source: str
    needs_model: bool = False
    """Whether a draft's checkpoint must be named."""
    pipeline: bool = False
    """Whether it runs under pipeline parallelism."""
    searched: tuple[int, ...] = ()
    """Draft lengths that the search tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One reason why a configuration cannot be deployed."""

    knob: str
    value: Any
    reason: str

    def __str__(self) -> str:
        """Return `knob=value: reason`."""
        return f"{self.knob}={self.value}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRules:
    """One engine version."""

    name: str
    title: str
    version: str
    quantizations: Mapping[str, PrecisionRule]
    kv_cache_dtypes: Mapping[str, PrecisionRule]
    knobs: Mapping[str, KnobRule]
    moe_backends: tuple[MoeBackendRule, ...] = ()
    speculation: Mapping[str, SpeculationRule] = field(default_factory=dict)
    """By decoding type."""
    spreads_experts_over_all_ranks: bool = False
    """Whether expert parallelism is over all tensor-parallel ranks or none."""

    @property
    def fixed(self) -> Mapping[str, KnobRule]:
        """Knobs with one legal value: the engine has no option for them, and is sent none."""
        return {knob: rule for knob, rule in self.knobs.items() if len(rule.values) == 1}

    def unsent(self, config: EngineConfig) -> list[Violation]:
        """Return what a configuration sets that the engine could not be told."""
        found = [
            Violation(knob=knob, value=getattr(config, knob), reason=rule.words)
            for knob, rule in self.fixed.items()
            if getattr(config, knob) not in rule.values
        ]
        experts, ranks = config.moe_expert_parallel_size, config.tensor_parallel_size
        if self.spreads_experts_over_all_ranks and experts not in (1, ranks):
            reason = f"experts are spread over all {ranks} tensor-parallel ranks, or over none"
            found.append(_violation(config, "moe_expert_parallel_size", reason))
        return found

    def violations(
        self, config: EngineConfig, *, model: ModelSpec, gpu: GpuSpec
    ) -> list[Violation]:
        """Return every reason why the configuration cannot be deployed; empty when it can."""
        found = [
            *self._precision(config, model, gpu),
            *self.unsent(config),
            *self._knob_values(config, model),
            *self._expert_kernels(config, model, gpu),
            *self._speculation(config, model),
            *_contradictions(config, model),
        ]
        try:
            check_divides(model, config)
        except ConfigError as error:
            found.append(
                Violation(
                    knob="tensor_parallel_size",
                    value=config.tensor_parallel_size,
                    reason=error.message,
                )
            )
        return found

    def legal_values(self, knob: str, *, model: ModelSpec, gpu: GpuSpec) -> tuple[Any, ...]:
        """Return the values of a knob that the search may try on this model and GPU."""
        if knob == "quantization":
            return self._quantizations(model, gpu)
        if knob == "kv_cache_dtype":
            # FP16 stores and computes as BF16 does: the search needs one of the two.
            names = (n for n, rule in self.kv_cache_dtypes.items() if n != "fp16")
            return tuple(n for n in names if _runs(self.kv_cache_dtypes[n], gpu))
        rule = self.knobs[knob]
        values = rule.searched or rule.values
        if knob == "moe_backend" and model.is_moe:
            named = [b for r in self.moe_backends if gpu.sm in r.sm for b in r.backends]
            values = tuple(dict.fromkeys([*values, *named]))
        if model.uses_mla and rule.mla_values:
            values = tuple(value for value in values if value in rule.mla_values)
        return values

    def moe_backend(self, quantization: str, gpu: GpuSpec) -> str:
        """Return the expert kernels that a precision runs on, or the engine's default."""
        for rule in self.moe_backends:
            if quantization in rule.quantizations and gpu.sm in rule.sm:
                return rule.backends[0]
        return EngineConfig().moe_backend

    def _quantizations(self, model: ModelSpec, gpu: GpuSpec) -> tuple[str, ...]:
        native = model.checkpoint_quantization
        if native in NATIVE_ONLY:
            return (native,) if _runs(self.quantizations[native], gpu) else ()
        names = [
            name
            for name, rule in self.quantizations.items()
            if _runs(rule, gpu) and rule.searched and name not in (*NATIVE_ONLY, "fp16")
        ]
        if native == "fp8_block":
            # Published in FP8 blocks: there is no BF16 checkpoint to start from.
            names = [name for name in names if name in ("fp8_block", "nvfp4")]
        else:
            names = [name for name in names if name != "fp8_block" or model.is_moe]
        return tuple(names)

    def _precision(self, config: EngineConfig, model: ModelSpec, gpu: GpuSpec) -> list[Violation]:
        found = []
        for knob, table in (
            ("quantization", self.quantizations),
            ("kv_cache_dtype", self.kv_cache_dtypes),
        ):
            value = getattr(config, knob)
            rule = table.get(value)
            if rule is None:
                reason = f"{self.title} does not offer it; offered: {', '.join(table)}"
            elif not rule.deployable:
                reason = rule.reason
            elif gpu.sm not in rule.sm:
                reason = f"{gpu.title} (sm{gpu.sm}) cannot run it ({rule.source})"
            elif rule.with_quantizations and config.quantization not in rule.with_quantizations:
                reason = f"needs weights in {' or '.join(rule.with_quantizations)}"
            else:
                continue
            found.append(Violation(knob=knob, value=value, reason=reason))
        if config.quantization in NATIVE_ONLY and model.checkpoint_quantization not in NATIVE_ONLY:
            reason = "exists only for models published so (gpt-oss)"
            found.append(Violation(knob="quantization", value=config.quantization, reason=reason))
        return found

    def _expert_kernels(
        self, config: EngineConfig, model: ModelSpec, gpu: GpuSpec
    ) -> list[Violation]:
        if not model.is_moe:
            return []
        searched = self.knobs["moe_backend"].searched if "moe_backend" in self.knobs else ()
        for rule in self.moe_backends:
            if config.quantization in rule.quantizations and gpu.sm in rule.sm:
                known, source = rule.backends, rule.source
                break
        else:
            known, source = searched, "no other backend is documented for this precision and GPU"
        if not known or config.moe_backend in known:
            return []
        reason = f"{config.quantization} on {gpu.title} takes {' or '.join(known)} ({source})"
        return [Violation(knob="moe_backend", value=config.moe_backend, reason=reason)]

    def _speculation(self, config: EngineConfig, model: ModelSpec) -> list[Violation]:
        if not config.decoding_type and not config.max_draft_len:
            return []
        rule = self.speculation.get(config.decoding_type)
        if rule is None:
            offered = ", ".join(self.speculation)
            if not config.decoding_type:
                return [_violation(config, "max_draft_len", f"needs decoding_type: {offered}")]
            reason = f"{self.title} does not offer it; offered: {offered}"
            return [_violation(config, "decoding_type", reason)]
        size, stages = config.max_matching_ngram_size, config.pipeline_parallel_size
        pairs = (
            (not config.max_draft_len, "max_draft_len", "drafts at least one token"),
            (
                rule.needs_model and not config.speculative_model,
                "speculative_model",
                f"{config.decoding_type} needs the draft's checkpoint",
            ),
            (
                config.decoding_type == "MTP" and not model.mtp_layers,
                "decoding_type",
                f"{model.name} has no multi-token-prediction layer",
            ),
            (
                config.decoding_type == "NGram" and size < 1,
                "max_matching_ngram_size",
                "n-grams have one token at least",
            ),
            (
                stages > 1 and not rule.pipeline,
                "pipeline_parallel_size",
                f"is not combined with {config.decoding_type} ({rule.source})",
            ),
        )
        return [_violation(config, knob, reason) for broken, knob, reason in pairs if broken]

    def _knob_values(self, config: EngineConfig, model: ModelSpec) -> list[Violation]:
        found = []
        for knob, rule in self.knobs.items():
            if len(rule.values) == 1:
                continue
            value = getattr(config, knob)
            legal = rule.mla_values if model.uses_mla and rule.mla_values else rule.values
            if value not in legal:
                reason = f"accepted: {', '.join(map(str, legal))} ({rule.source})"
                found.append(Violation(knob=knob, value=value, reason=reason))
        return found


def check_values(config: EngineConfig) -> None:
    """Refuse values that no engine could take.

    Raises:
        ConfigError: With knob, value and what would be accepted.
    """
    for knob, names in _NAMES.items():
        value = getattr(config, knob)
        if value not in names:
            known = ", ".join(filter(None, names))
            raise ConfigError(f"{knob}={value} is unknown", hint=f"known: {known}")
    for knob in KNOBS:
        value = getattr(config, knob)
        low, high = _RANGES.get(knob, (1, 10_000_000))
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not low <= value <= high:
            raise ConfigError(f"{knob}={value} is out of range", hint=f"accepted: {low} to {high}")


_NAMES: Mapping[str, tuple[str, ...]] = {
    "capacity_scheduler_policy": (
        "GUARANTEED_NO_EVICT",
        "MAX_UTILIZATION",
        "STATIC_BATCH",
        "RECOMPUTE",
    ),
    "context_chunking_policy": ("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"),
    "decoding_type": ("", *PRIORS),
    "queue_order": (
        "FIRST_COME_FIRST_SERVED",
        "SHORTEST_JOB_FIRST",
        "PRIORITY",
        "LONGEST_PREFIX_MATCH",
    ),
}
"""Rules that some engine follows, by knob."""

_RANGES: Mapping[str, tuple[float, float]] = {
    "max_seq_len": (0, 10_000_000),
    "kv_cache_max_tokens": (0, 10**12),
    "host_cache_size": (0, 10**14),
    "cuda_graph_max_batch_size": (0, 65536),
    "max_batch_size": (1, 65536),
    "max_num_tokens": (1, 1_048_576),
    "tokens_per_block": (1, 4096),
    "free_gpu_memory_fraction": (0.01, 0.999),
    "gpu_memory_utilization": (0.01, 1.0),
    "tensor_parallel_size": (1, 64),
    "pipeline_parallel_size": (1, 64),
    "moe_expert_parallel_size": (1, 64),
    "stream_interval": (1, 10_000),
    "max_draft_len": (0, 64),
    "max_matching_ngram_size": (0, 64),
}


def _runs(rule: PrecisionRule, gpu: GpuSpec) -> bool:
    return rule.deployable and gpu.sm in rule.sm


def _contradictions(config: EngineConfig, model: ModelSpec) -> list[Violation]:
    """Pairs of knobs that exclude each other."""
    pairs = (
        (
            config.max_batch_size > config.max_num_tokens,
            "max_batch_size",
            f"a step of max_num_tokens={config.max_num_tokens} cannot hold that many sequences",
        ),
        (
            config.enable_attention_dp and config.tensor_parallel_size == 1,
            "enable_attention_dp",
            "needs tensor_parallel_size above 1",
        ),
        (
            config.moe_expert_parallel_size > 1 and not model.is_moe,
            "moe_expert_parallel_size",
            f"{model.name} has no experts",
        ),
        (
            config.enable_attention_dp and config.pipeline_parallel_size > 1,
            "pipeline_parallel_size",
            "is not combined with attention DP here",
        ),
        (
            config.enable_piecewise_cuda_graph and config.decoding_type == "DraftTarget",
            "enable_piecewise_cuda_graph",
            "torch.compile works with one model, not with a draft beside it",
        ),
    )
    return [_violation(config, knob, reason) for broken, knob, reason in pairs if broken]


def _violation(config: EngineConfig, knob: str, reason: str) -> Violation:
    return Violation(knob=knob, value=getattr(config, knob), reason=reason)
