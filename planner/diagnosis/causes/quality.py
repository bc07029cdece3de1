"""Quality: precisions that lose more than was allowed, by what is published or was judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import Finding, Remedy
from planner.diagnosis.prospect import Prospect
from planner.diagnosis.remedies import effects
from planner.quality import QUALITY_LOSS, QualityTable, Source
from planner.quality.files import load_quality

CALIBRATED = ("fp8", "int8_sq", "w4a16_awq", "w4a16_gptq", "w4a8_awq", "nvfp4")
"""Quantizations whose scales come from calibration data."""


def quality_degradation(case: RunCase) -> Finding | None:
    """The run's precisions lose more quality than was allowed."""
    prospect, limit = case.prospect, case.max_quality_loss_pct
    if prospect is None or limit is None:
        return None
    table = load_quality(prospect.evaluator.model)
    config = prospect.config
    loss = table.loss(config.quantization, config.kv_cache_dtype)
    if loss.loss_pct <= limit:
        return None
    low, high = loss.interval_90
    return Finding(
        cause="quality_degradation",
        words=f"{config.quantization} with a {config.kv_cache_dtype} KV cache loses quality",
        evidence=(
            f"{loss.loss_pct:.2f} % ({low:.2f} to {high:.2f}), {loss.provenance}: "
            f"{'; '.join(loss.sources)}",
        ),
        remedies=(*_gentler(case, prospect, table, limit), *_better_calibrated(case, prospect)),
        ratios={QUALITY_LOSS: 0.0},
    )


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "quality_degradation": quality_degradation,
}


def quality_loss_pct(prospect: Prospect) -> float:
    """Return what the precisions of a run are expected to lose."""
    config = prospect.config
    table = load_quality(prospect.evaluator.model)
    return table.loss(config.quantization, config.kv_cache_dtype).loss_pct


def _gentler(
    case: RunCase, prospect: Prospect, table: QualityTable, limit: float
) -> Iterator[Remedy]:
    """Yield the precisions that keep the limit, with what they do to speed."""
    config, simulated = prospect.config, case.simulated
    for knob, value in _precisions(prospect):
        pair = {
            "quantization": config.quantization,
            "kv_cache_dtype": config.kv_cache_dtype,
            knob: value,
        }
        loss = table.loss(pair["quantization"], pair["kv_cache_dtype"])
        after = simulated.with_knobs(**{knob: value}) if simulated else None
        if loss.loss_pct > limit or (simulated and after is None):
            continue
        yield Remedy(
            knob=case.knob(knob),
            action=case.turn(knob, getattr(config, knob), value),
            effects=effects(prospect.base, after) if after else (),
            note=f"loses {loss.loss_pct:.2f} %",
        )


def _precisions(prospect: Prospect) -> Iterator[tuple[str, str]]:
    model, gpu = prospect.evaluator.model, prospect.evaluator.gpu
    for knob in ("kv_cache_dtype", "quantization"):
        for value in prospect.rules.legal_values(knob, model=model, gpu=gpu):
            if value != getattr(prospect.config, knob):
                yield knob, value


def _better_calibrated(case: RunCase, prospect: Prospect) -> Iterator[Remedy]:
    """Yield what may help at the same precision, where scales come from calibration."""
    if prospect.config.quantization not in CALIBRATED:
        return
    yield Remedy(
        knob=case.knob("quantization"),
        action="planner quantize with more --samples and text like the users', judged by planner "
        "quality",
        note=f"no effect is predicted: {Source.MEASURED} losses alone can tell",
    )
