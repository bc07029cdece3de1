"""What is wrong with a run: it failed, misses its SLO, or is worse than predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cost_models.errors import ConfigError
from planner.diagnosis.case import RunCase
from planner.diagnosis.causes.quality import quality_loss_pct
from planner.diagnosis.finding import RATES, Complaint, ComplaintKind
from planner.quality import QUALITY_LOSS
from planner.validation.drift import drifts

LONG_TAIL, VISIBLE_MS = 5.0, 100.0
"""P99 of the gaps between tokens, over their median and itself, from which a reader sees a halt."""

LONG_WAIT = 0.25
"""Share of a request's whole time from which the wait for its first token is long."""

AS_PREDICTED = 1.05
"""Measured over predicted time up to which a whole request is as predicted."""

FRONT_END_LIMITED = 0.8
"""Share of the front end's time above which a prediction says little about the GPU."""


def complaints_of(case: RunCase) -> tuple[Complaint, ...]:
    """Return all that is wrong; of a run without trouble and SLO, where its time went.

    Raises:
        ConfigError: An SLO on a metric that the run does not have.
    """
    if case.failed:
        return (_failure(case),)
    troubles = (*_missed_limits(case), *_lost_quality(case), *_gaps(case))
    if case.slo:
        return troubles
    return (*troubles, *_where_time_went(case))


def _failure(case: RunCase) -> Complaint:
    said = case.error.splitlines()[0] if case.error else "it left no message"
    return Complaint(
        kind=ComplaintKind.FAILED,
        metric="",
        measured=0.0,
        reference=0.0,
        words=f"failed ({case.status}): {said}",
    )


def _missed_limits(case: RunCase) -> Iterator[Complaint]:
    for metric, limit in case.slo.items():
        if metric not in case.measured:
            raise ConfigError(
                f"--slo {metric}: {case.run.run_id} has no such metric",
                hint=f"it has: {', '.join(sorted(case.measured))}",
            )
        value = case.measured[metric]
        if value > limit:
            yield Complaint(
                kind=ComplaintKind.MISSES_SLO,
                metric=metric,
                measured=value,
                reference=limit,
                words=f"{metric} {value:.4g} is over the limit of {limit:.4g}",
            )


def _lost_quality(case: RunCase) -> Iterator[Complaint]:
    limit = case.max_quality_loss_pct
    if limit is None or case.prospect is None:
        return
    loss = quality_loss_pct(case.prospect)
    if loss > limit:
        yield Complaint(
            kind=ComplaintKind.MISSES_SLO,
            metric=QUALITY_LOSS,
            measured=loss,
            reference=limit,
            words=f"{QUALITY_LOSS} {loss:.3g} is over the limit of {limit:.3g}",
        )


def _gaps(case: RunCase) -> Iterator[Complaint]:
    """Watched metrics that are worse than the far end of their interval."""
    prospect = case.simulated
    if prospect is not None:
        if prospect.base.front_end_share >= FRONT_END_LIMITED:
            return
        said = {n: (m.value, m.interval_90) for n, m in prospect.base.metrics.items()}
    else:
        stored = case.record.get("predicted") or {}
        said = {n: (p["value"], tuple(p["interval_90"])) for n, p in stored.items()}
    beside = _whole_request_words(case, said)
    for drift in drifts(case.run.run_id, case.measured, said):
        is_worse = (drift.measured < drift.predicted) == (drift.metric in RATES)
        if is_worse:
            low, high = drift.interval_90
            yield Complaint(
                kind=ComplaintKind.WORSE_THAN_PREDICTED,
                metric=drift.metric,
                measured=drift.measured,
                reference=drift.predicted,
                words=f"{drift.metric} {drift.measured:.4g}, predicted {drift.predicted:.4g} "
                f"({low:.4g} to {high:.4g}){beside}",
            )


def _whole_request_words(
    case: RunCase, said: Mapping[str, tuple[float, tuple[float, float]]]
) -> str:
    """Say where a part of the time only moved to another part."""
    measured, (predicted, _) = case.measured.get("e2el_ms.mean"), said.get("e2el_ms.mean", (0, 0))
    if not measured or not predicted or measured > AS_PREDICTED * predicted:
        return ""
    return "; the whole request is as predicted, so time moved within it"


def _where_time_went(case: RunCase) -> Iterator[Complaint]:
    whole, wait = (case.measured.get(f"{name}_ms.mean", 0.0) for name in ("e2el", "ttft"))
    if whole:
        yield _time("e2el_ms.mean", whole, f"e2el_ms.mean {whole:.4g}")
    if wait > LONG_WAIT * whole > 0:
        share = f"{100 * wait / whole:.0f} % of the whole request"
        yield _time("ttft_ms.mean", wait, f"ttft_ms.mean {wait:.4g} is {share}")
    tail, median = (case.measured.get(f"itl_ms.{s}", 0.0) for s in ("p99", "p50"))
    if median and tail > max(LONG_TAIL * median, VISIBLE_MS):
        yield Complaint(
            kind=ComplaintKind.TAIL,
            metric="itl_ms.p99",
            measured=tail,
            reference=median,
            words=f"itl_ms.p99 {tail:.4g} is {tail / median:.0f} times the median {median:.4g}",
        )


def _time(metric: str, value: float, words: str) -> Complaint:
    return Complaint(
        kind=ComplaintKind.TIME, metric=metric, measured=value, reference=0.0, words=words
    )
