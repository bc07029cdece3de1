"""What a step loses: a checkpoint is made and judged where there are weights and text."""

from __future__ import annotations

from pathlib import Path

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from planner.quality import QualityLoss, QualityTable, Source
from planner.quality.files import loss_of


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
        has_weights = folder is not None and folder.is_dir() and any(folder.glob("*.safetensors"))
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
            _quantize(self.folder, scheme, data=self.calibration_data, out=target)
        return str(target)

    def loss(self, checkpoint: str, *, config: EngineConfig, expected: QualityTable) -> QualityLoss:
        """Return what a step loses against the unquantized model: judged, else as expected.

        Args:
            checkpoint: Folder of the step; empty where none was made.
            config: Whose precisions are judged.
            expected: What is published, or was measured of this model before.

        Raises:
            PlannerError: It cannot be judged.
        """
        known = expected.loss(config.quantization, config.kv_cache_dtype)
        if self.folder is None or not checkpoint or not self.data:
            return known
        if known.provenance is Source.EXACT:
            return known
        return self._judged(Path(checkpoint), self.folder, config)

    def _judged(self, checkpoint: Path, against: Path, config: EngineConfig) -> QualityLoss:
        from executor.quality.judge import QualityRequest, judge  # noqa: PLC0415

        report = judge(
            QualityRequest(
                model=checkpoint,
                against=against,
                data=Path(self.data),
                kv_cache_dtype=config.kv_cache_dtype,
                max_documents=self.documents,
                new_tokens=0,
            )
        )
        return loss_of(report.to_json())


def _quantize(folder: Path, scheme: str, *, data: str, out: Path) -> None:
    from executor.quantization.quantize import QuantizeRequest, quantize  # noqa: PLC0415

    quantize(QuantizeRequest(model=folder, scheme=scheme, calibration_data=Path(data), out=out))
