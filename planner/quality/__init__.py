"""What a precision costs in quality: published, or measured for this very model."""

from planner.quality.table import QUALITY_LOSS, QualityLoss, QualityTable, Source

__all__ = ["QUALITY_LOSS", "QualityLoss", "QualityTable", "Source"]
