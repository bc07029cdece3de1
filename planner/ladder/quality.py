"""What a step loses: a checkpoint is made and judged where there are weights and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError

LOSS = "perplexity_loss_pct"
"""The estimate of `planner quality` that the limit is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Perplexity that a step costs, in percent, with its interval."""

    value_pct: float
    low_pct: float
    high_pct: float
    origin: str
    """`measured`, or `prior` where a publication says so of other models."""
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "value": round(self.value_pct, 4),
            "interval": [round(self.low_pct, 4), round(self.high_pct, 4)],
            "origin": self.origin,
            "source": self.source or None,
        }


class Judge:
    """Makes and judges the checkpoints of the steps; each is made once.

    Args:
        model: Folder with weights, or a name or config.json: then nothing is made.
        calibration_data: Text that quantization is calibrated on.
        data: Held-out text that is judged.
        documents: How many documents of it at most.
        out: Folder for the checkpoints.
    """

    def __init__(
        self, *, model: str, calibration_data: str, data: str, documents: int, out: str
    ) -> None:
        folder = Path(model) if model else None
        has_weights = (
            folder is not None and folder.is_dir() and any(folder.glob("*.safetensors"))
        )
        self.folder = folder if has_weights else None
        self.calibration_data, self.data, self.out = calibration_data, data, out
        self.documents = documents
        if (calibration_data or data) and self.folder is None:
            raise ConfigError(
                "--calibration-data and --data need a checkpoint with weights",
                hint="give its folder as --model",
            )
        if calibration_data and not out:
            raise ConfigError("checkpoints that are made need a folder", hint="give --out DIR")

    def checkpoint(self, scheme: str, below: str) -> str:
        """Return the folder of a step's checkpoint; empty where there is none.

        Args:
            scheme: Of `planner quantize`; empty keeps the weights.
            below: Checkpoint of the step that this one goes on from.

        Raises:
            PlannerError: It cannot be made.
        """
        if self.folder is None:
            return ""
        if below or not scheme:
            return below or str(self.folder)
        if not self.calibration_data:
            return ""
        target = Path(self.out) / scheme
        if not (target / "config.json").is_file():
            self._quantize(scheme, target)
        return str(target)

    def loss(self, checkpoint: str, *, config: EngineConfig, model: str) -> Loss | None:
        """Return what a step loses against the unquantized model; None where nothing is known.

        Raises:
            PlannerError: It cannot be judged.
        """
        if config.quantization in ("bf16", "fp16") and config.kv_cache_dtype in ("bf16", "fp16"):
            return Loss(value_pct=0.0, low_pct=0.0, high_pct=0.0, origin="measured", source="itself")
        if not checkpoint or not self.data or self.folder is None:
            return None
        return self._judged(Path(checkpoint), config)

    def _quantize(self, scheme: str, target: Path) -> None:
        from executor.quantization.quantize import QuantizeRequest, quantize  # noqa: PLC0415

        assert self.folder is not None, "only a folder is quantized"
        quantize(
            QuantizeRequest(
                model=self.folder,
                scheme=scheme,
                calibration_data=Path(self.calibration_data),
                out=target,
            )
        )

    def _judged(self, checkpoint: Path, config: EngineConfig) -> Loss:
        from executor.quality.judge import QualityRequest, judge  # noqa: PLC0415

        assert self.folder is not None, "only a folder is judged"
        report = judge(
            QualityRequest(
                model=checkpoint,
                against=self.folder,
                data=Path(self.data),
                kv_cache_dtype=config.kv_cache_dtype,
                max_documents=self.documents,
                new_tokens=0,
            )
        )
        found = report.estimates[LOSS]
        return Loss(
            value_pct=found.value,
            low_pct=found.low,
            high_pct=found.high,
            origin="measured",
            source=f"{report.num_documents} documents, {report.num_tokens:,} tokens",
        )
