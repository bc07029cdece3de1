"""What a ladder is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderRequest:
    """Everything that `ladder` can be told."""

    gpu: str
    model: str = ""
    """Name, config.json or folder; a folder with weights can be quantized and judged."""
    workload: str = "ladder"
    backend: str = "trtllm"
    """Engine of all steps but the first: trtllm or vllm."""
    max_quality_loss_pct: float | None = None
    """Loss beside the BF16 checkpoint from which no coarser weights are tried."""
    calibration_data: str = ""
    samples: int = 256
    """Sequences of it at most."""
    data: str = ""
    """Held-out text for the judgement."""
    documents: int = 200
    """Documents of it at most."""
    out: str = ""
    """Folder for the checkpoints that are made."""
    store: str = "sqlite:///planner-runs.db"
    time_budget_s: float = 600.0
    """For the measurements of one step."""
    seed: int = 0
    predict_only: bool = False
    """Measure nothing, also where the engine and the GPU are here."""
    progress: Callable[[str], None] | None = None
