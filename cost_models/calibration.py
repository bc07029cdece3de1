"""Everything measured that the cost models read: operators, step constants, memory constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cost_models.acceptance import Acceptance
from cost_models.frontend import FrontEndConstants
from cost_models.memory import MemoryConstants
from cost_models.operators.attention import DecodeAttentionParams, PrefillAttentionParams
from cost_models.operators.collectives import AllReduceParams, NcclParams
from cost_models.operators.fit import OperatorFit
from cost_models.operators.gemm import GemmParams
from cost_models.operators.mla import MlaBmmParams, MlaDecodeParams, MlaPrefillParams
from cost_models.operators.moe import MoeParams
from cost_models.step_constants import StepConstants


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


def interval_key(metric: str, protocol: str = "") -> str:
    """Return the name of a metric's interval; with a protocol, of that under this kind of load."""
    return f"{protocol}/{metric}" if protocol else metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What is known of one engine on one GPU."""

    gpu: str
    engine: str
    engine_version: str
    provenance: Provenance
    operators: OperatorFits
    step: StepConstants
    memory: MemoryConstants
    front_end: FrontEndConstants = field(default_factory=FrontEndConstants)
    intervals: Mapping[str, ErrorQuantiles] = field(default_factory=dict)
    """Cross-validated error by `interval_key`."""
    borrowed: frozenset[str] = frozenset()
    """`family/dtype` of the operators that come from another GPU's tables."""
    seen_versions: tuple[str, ...] = ()
    """Engine versions of the runs behind the constants; empty where they are not stated."""
    acceptances: Mapping[str, Acceptance] = field(default_factory=dict)
    """How often drafts of a model's text were right in runs, by `MODEL/DECODING_TYPE`."""
    sources: tuple[str, ...] = ()
