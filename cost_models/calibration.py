"""Everything measured that the cost models read: operators, step constants, memory constants."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cost_models.acceptance import Acceptance
from cost_models.engine_traits import EngineTraits
from cost_models.frontend import FrontEndConstants
from cost_models.memory import MemoryConstants
from cost_models.operators.attention import DecodeAttentionParams, PrefillAttentionParams
from cost_models.operators.collectives import AllReduceParams, NcclParams
from cost_models.operators.fit import OperatorFit
from cost_models.operators.gemm import GemmParams
from cost_models.operators.mla import MlaBmmParams, MlaDecodeParams, MlaPrefillParams
from cost_models.operators.moe import MoeParams
from cost_models.step_constants import OPERATOR_FAMILIES, StepConstants

HOST_STEP_CONSTANTS = (
    "host_s", "host_per_sequence_s", "eager_layer_s", "eager_layer_tp_s", "eager_sequence_s",
    "eager_layer_fp8_cache_s", "host_floor_s", "host_floor_per_sequence_s",
    "synchronous_host_s", "synchronous_host_per_sequence_s", "draft_pass_s", "draft_layer_s",
    "drafting_layer_pass_s",
    "piecewise_decode_layer_s",
)  # fmt: skip
"""Constants of a step that are seconds of the host's processor."""

HOST_FRONT_END_CONSTANTS = (
    "request_s", "prompt_token_s", "active_stream_s", "first_token_s", "streamed_token_s",
    "streamed_chunk_s",
)  # fmt: skip
"""The same of the front end."""

HOST_LOG_SD = 0.25
"""How far hosts differ in speed, as the standard deviation of its logarithm, before one is seen.

Single threads of server processors that are sold together run at 2.5 to 4 GHz under load: a factor
of 1.3 to either side of the middle. No measured run enters this figure.
"""


class Provenance(StrEnum):
    """Where a number comes from, from the least to the most trustworthy."""

    DATASHEET = "datasheet"
    """Peak rates of this GPU with efficiencies carried over from a similar one."""
    CALIBRATED = "calibrated"
    """Fitted on measurements of this GPU."""
    MEASURED = "measured"
    """Observed on a run of this very configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFits:
    """Fitted operators of one GPU, each by the dtype of its tables."""

    gemm: Mapping[str, OperatorFit[GemmParams]]
    attention_prefill: Mapping[str, OperatorFit[PrefillAttentionParams]]
    attention_decode: Mapping[str, OperatorFit[DecodeAttentionParams]]
    moe: Mapping[str, OperatorFit[MoeParams]]
    mla_prefill: Mapping[str, OperatorFit[MlaPrefillParams]]
    mla_decode: Mapping[str, OperatorFit[MlaDecodeParams]]
    mla_bmm: Mapping[str, OperatorFit[MlaBmmParams]]
    allreduce: Mapping[str, OperatorFit[AllReduceParams]]
    nccl: Mapping[str, OperatorFit[NcclParams]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorQuantiles:
    """5th and 95th percentile of log(measured / predicted): a 90 % interval."""

    log_q05: float
    log_q95: float


def interval_key(metric: str, regime: str = "") -> str:
    """Return the name of a metric's interval; with a regime, of that under this kind of load."""
    return f"{regime}/{metric}" if regime else metric


def interval_keys(metric: str, regime: str) -> tuple[str, ...]:
    """Return the names of the intervals that hold for a metric, the nearest kind of load first."""
    protocol = "open_loop" if regime.startswith("open_loop") else regime
    return tuple(dict.fromkeys(interval_key(metric, kind) for kind in (regime, protocol, "")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What is known of one engine on one GPU."""

    gpu: str
    traits: EngineTraits
    """The engine, and what is its own."""
    engine_version: str
    provenance: Provenance
    operators: OperatorFits
    step: StepConstants
    memory: MemoryConstants
    front_end: FrontEndConstants = field(default_factory=FrontEndConstants)
    intervals: Mapping[str, ErrorQuantiles] = field(default_factory=dict)
    """Cross-validated error by `interval_key`."""
    borrowed: Set[str] = frozenset()
    """`family/dtype` of the operators that come from another GPU's tables."""
    seen_versions: tuple[str, ...] = ()
    """Engine versions of the runs behind the constants; empty where they are not stated."""
    seen_gpus: tuple[str, ...] = ()
    """GPUs of the machines whose runs the constants rest on; empty where they are not stated."""
    knows_host: bool = False
    """Whether runs of the user's own, on this GPU, are among them."""
    seen_operators: Set[str] = frozenset()
    """`family/dtype` of what those runs used: residuals hold what a borrowed one errs by."""
    acceptances: Mapping[str, Acceptance] = field(default_factory=dict)
    """How often drafts of a model's text were right in runs, by `MODEL/DECODING_TYPE`."""
    sources: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        """The name of the engine."""
        return self.traits.name

    @property
    def borrows_host(self) -> bool:
        """Whether the host's constants come from other machines alone.

        Hosts of the same GPU differ as much as those of different ones. Where no runs are stated,
        the residuals were made between hosts and hold that already.
        """
        return bool(self.seen_gpus) and not self.knows_host

    def with_slower_host(self, factor: float) -> Calibration:
        """Return the same on a host whose processor takes so many times as long."""
        step = {name: factor * getattr(self.step, name) for name in HOST_STEP_CONSTANTS}
        front = {name: factor * getattr(self.front_end, name) for name in HOST_FRONT_END_CONSTANTS}
        return replace(
            self, step=replace(self.step, **step), front_end=replace(self.front_end, **front)
        )

    def slower(self, factor: float) -> Calibration:
        """Return the same on a machine, GPU and host, that takes so many times as long."""
        scale = self.step.family_scale
        slower = {name: factor * scale.get(name, 1.0) for name in OPERATOR_FAMILIES}
        host = self.with_slower_host(factor)
        return replace(host, step=replace(host.step, family_scale={**scale, **slower}))
