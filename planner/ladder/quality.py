"""What a step loses: a checkpoint is made and judged where there are weights and text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from planner.quality import QualityLoss, QualityTable, Source
from planner.quality.files import loss_of

if TYPE_CHECKING:
    from planner.ladder.request import LadderRequest


class Judge:
    """Makes and judges the checkpoints of the steps; each is made once.

    Args:
        request: Whose model is quantized, if it is a folder with weights, and with what text.

    Raises:
        ConfigError: Text without weights, or nowhere to put a checkpoint.
    """

    def __init__(self, request: LadderRequest) -> None:
        self.request = request
        folder = Path(request.model) if request.model else None
        has_weights = folder is not None and folder.is_dir() and any(folder.glob("*.safetensors"))
        self.folder = folder if has_weights else None
        if (request.calibration_data or request.data) and self.folder is None:
            raise ConfigError(
                "--calibration-data and --data need a checkpoint with weights",
                hint="give its folder as --model",
            )
        if request.calibration_data and not request.out:
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
        if not self.request.calibration_data:
            return ""
        target = Path(self.request.out) / scheme
        if not (target / "config.json").is_file():
            self._quantize(self.folder, scheme, target)
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
        if self.folder is None or not checkpoint or not self.request.data:
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
                data=Path(self.request.data),
                kv_cache_dtype=config.kv_cache_dtype,
                max_documents=self.request.documents,
                new_tokens=0,
            )
        )
        return loss_of(report.to_json())

    def _quantize(self, folder: Path, scheme: str, out: Path) -> None:
        from executor.quantization.calibration import CalibrationSize  # noqa: PLC0415
        from executor.quantization.quantize import QuantizeRequest, quantize  # noqa: PLC0415

        quantize(
            QuantizeRequest(
                model=folder,
                scheme=scheme,
                calibration_data=Path(self.request.calibration_data),
                out=out,
                size=CalibrationSize(num_samples=self.request.samples),
            )
        )
