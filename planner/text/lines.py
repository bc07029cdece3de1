"""Parts of plans, predictions and diagnoses in words, the same on the command line and in the TUI.

Nothing here is coloured or laid out: every function returns plain lines, the first of which leads.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from planner.percent import probability_words

if TYPE_CHECKING:
    from cost_models.speculation import Speculation
    from planner.diagnosis.finding import Diagnosis, RankedFinding, Remedy
    from planner.plans.scheduling import OrderAlternative, Scheduling
    from planner.prediction.predict import Prediction
    from planner.quality import QualityLoss
    from planner.search.study import Candidate

NO_BREAK = "\u00a0"
"""Stands between words that belong on one line."""

FRONT_TITLE = "Pareto front by quality"

SCHEDULING_TITLE = "Scheduling: other orders of the waiting queue"

UNQUANTIZED = "as the published checkpoint"
"""Quality of a configuration that rounds nothing."""


def loss_words(quality: QualityLoss) -> str:
    """Return the expected loss of quality with its interval and where it is from."""
    if not quality.sources:
        return UNQUANTIZED
    low, high = quality.interval_90
    return f"{quality.loss_pct:.2f} % expected loss ({low:.2f} to {high:.2f}, {quality.provenance})"


def limit_lines(prediction: Prediction) -> Iterator[str]:
    """Yield of each limit whether the prediction keeps it, by how much, and how likely that is."""
    for name, excess in prediction.slo_excess.items():
        is_met = excess <= 0
        distance = f"{100 * abs(excess):.0f} % {'below' if is_met else 'above'} the limit"
        line = f"{name}: {'met' if is_met else 'MISSED'}, {distance}"
        if name not in prediction.slo_probability:
            yield f"limit on quality {line}"
            continue
        odds = ", with a probability of" if is_met else "; probability that it holds:"
        yield f"SLO {line}{odds} {probability_words(prediction.slo_probability[name])}"


def front_lines(front: Sequence[Candidate]) -> Iterator[str]:
    """Yield what each amount of quality buys: the ends of the Pareto front at that loss."""
    for level in sorted({c.quality.loss_pct for c in front}):
        alike = [c for c in front if c.quality.loss_pct == level]
        names = dict.fromkeys(
            f"{c.config.quantization} kv {c.config.kv_cache_dtype}" for c in alike
        )
        yield (
            f"{level:5.2f} % loss: {', '.join(names)}: up to "
            f"{max(c.tok_per_s_per_gpu for c in alike):.0f} tokens/s/GPU, or "
            f"{max(c.tok_per_s_per_user for c in alike):.0f} tokens/s/user ({len(alike)})"
        )


def speculation_words(found: Speculation) -> str:
    """Return how many tokens a step yields, and how often a draft is right."""
    chances = ", ".join(f"{chance:.2f}" for chance in found.acceptance.conditional)
    return (
        f"Drafts: {found.tokens_per_step:.2f} tokens a step; right with {chances} by position "
        f"in {100 * found.acceptance.draft_rate:.0f} % of the steps ({found.acceptance.source})"
    )


def fusion_lines(savings: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield what fused kernels save each kind of step, by chain of operators."""
    for step, chains in savings.items():
        parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in chains.items())
        yield f"Fusion saves {1e3 * sum(chains.values()):.2f} ms a {step} step: {parts}"


def scheduling_lines(found: Scheduling) -> Iterator[str]:
    """Yield what other orders of the waiting queue would bring, and whether the engine has them."""
    share = f"two or more requests wait for {100 * found.contention:.1f} % of the time"
    if not found.matters:
        yield f"no difference: {share}, so nobody is overtaken"
    elif found.was_too_long:
        yield f"{share}; --scheduling simulates what an order would do"
    yield from (_order_words(one, found.engine) for one in found.alternatives)


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield what is wrong with a run, why, and what turning a knob would do."""
    yield f"{diagnosis.run_id}: {diagnosis.status}"
    if diagnosis.not_predicted:
        yield f"  not predicted: {diagnosis.not_predicted}"
    for complaint in diagnosis.complaints:
        yield f"  {'! ' if complaint.is_trouble else '  '}{complaint.words}"
    if diagnosis.is_well:
        yield "  Nothing wrong: no limit missed, nothing worse than predicted, no cause to name"
    for number, ranked in enumerate(diagnosis.findings, 1):
        yield from _finding_lines(number, ranked)
    for complaint in diagnosis.unexplained:
        yield f"  Not explained by anything in this run: {complaint.words}"
    if diagnosis.unexplained and diagnosis.status == "ok":
        yield "  If other runs agree, recalibrate: planner calibrate --runs FILE or --store URL"


def _order_words(one: OrderAlternative, engine: str) -> str:
    gains = ", ".join(
        f"{_metric_title(name)} {100 * (pair[1] / pair[0] - 1):+.1f} %"
        for name, pair in one.changes.items()
        if pair[0]
    )
    how = f"offered: {one.how}" if one.how else f"not offered by {engine}"
    return f"{one.queue_order} ({one.requests}): {gains}; {how}"


def _metric_title(metric: str) -> str:
    name, _, statistic = metric.partition(".")
    titles = {f"{key}_ms": title for title, key in (("TTFT", "ttft"), ("E2E", "e2el"))}
    if name not in titles:
        return "goodput"
    return f"{statistic.upper() if statistic != 'mean' else 'mean'} {titles[name]}"


def _finding_lines(number: int, ranked: RankedFinding) -> Iterator[str]:
    yield f"{number}. {ranked.finding.words} [{ranked.finding.cause}]"
    shares = [(share, c) for c, share in ranked.shares.items() if c.metric]
    if shares:
        accounts = ", ".join(f"{100 * share:.0f} % of {c.what}" for share, c in shares)
        yield f"   accounts for {accounts}"
    yield from (f"   - {line}" for line in ranked.finding.evidence)
    for remedy in ranked.finding.remedies:
        yield from _remedy_lines(remedy)


def _remedy_lines(remedy: Remedy) -> Iterator[str]:
    yield f"   > {remedy.action}{f' ({remedy.note})' if remedy.note else ''}"
    if remedy.effects:
        effects = (f"{e.metric} {e.before:,.4g} → {e.after:,.4g}" for e in remedy.effects)
        yield f"     {', '.join(effect.replace(' ', NO_BREAK) for effect in effects)}"


def folded(text: str, width: int) -> str:
    """Return a line of a report so that it fits: what is too long goes on further in below.

    It is not broken at no-break spaces, which become plain ones.
    """
    indent = len(text) - len(text.lstrip())
    lines = textwrap.fill(
        text,
        width,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace(NO_BREAK, " ")


LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2el_ms"))

RATES = (
    ("Requests", "request_per_s", "/s"),
    ("Goodput", "goodput_request_per_s", "requests/s"),
    ("Output", "output_tok_per_s_per_gpu", "tokens/s/GPU"),
    ("Cost", "usd_per_million_output_tokens", "USD/M output tokens"),
    ("Energy", "output_tokens_per_joule", "output tokens/J"),
)
