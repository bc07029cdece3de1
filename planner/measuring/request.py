"""What is to be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cost_models.engine import EngineConfig
from executor.observe import Observe
from executor.store import DEFAULT_URL

COMPARED_METRICS = (
    "ttft_ms.mean", "ttft_ms.p99", "tpot_ms.mean", "tpot_ms.p99", "itl_ms.p99", "e2el_ms.mean",
    "output_tok_per_s", "request_per_s", "kv_cache_tokens", "weight_bytes_per_gpu",
    "cuda_graph_bytes_per_gpu",
)  # fmt: skip
"""Metrics that are shown of runs, beside each other and beside their predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureRequest:
    """Everything that `measure` can be told."""

    backend: str
    workload: str = ""
    """Name or file; empty is that of the plan."""
    more_workloads: Sequence[str] = ()
    """Measured behind the same starts of the engine."""
    plan: str = ""
    """A plan.json; else `config` and `settings` say what is measured."""
    config: str = ""
    """The engine's options as YAML; TensorRT-LLM's where it is not described."""
    settings: Mapping[str, str] = field(default_factory=dict)
    configs: Sequence[EngineConfig] = ()
    """Configurations themselves, instead of a file."""
    rate_per_s: float | None = None
    """Instead of the workload's, as the mean lengths below."""
    isl: float | None = None
    osl: float | None = None
    model: str = ""
    gpu: str = ""
    """Profile name; empty is the GPU of this machine."""
    top: int = 1
    num_requests: int = 0
    random_weights: bool = False
    backend_options: Mapping[str, str] = field(default_factory=dict)
    store: str = DEFAULT_URL
    workdir: str = "planner-measure"
    time_budget_s: float = 600.0
    repeats: int = 0
    """Exactly so many; 0 lets their agreement decide."""
    seed: int = 0
    progress: Callable[[str, float], None] | None = None
    observe: Observe | None = None
    """Told twice a second what can be seen; from a thread beside the measurement."""
