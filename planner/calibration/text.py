"""What runs tell of their text: how often drafts are right, how much of the prompts is cached.

Neither belongs to an engine or a GPU. It is what a plan believes of the same model's text where
the workload does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cost_models.acceptance import Acceptance, DraftCounts
from cost_models.profile_io import load_model
from planner.workloads.measured import MeasuredRun

CACHED_TOKENS = "num_prefix_cache_hit_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRates:
    """Rates by what they belong to, each pooled over its runs."""

    acceptances: Mapping[str, Acceptance]
    """By `Calibration.acceptances`' key: model and decoding type."""
    prefix_hits: Mapping[str, float]
    """Share of the prompt tokens that were found in the prefix cache, by model."""

    def lines(self) -> list[str]:
        """Say each rate and what it rests on."""
        lines = [
            f"acceptance of {key}: {', '.join(f'{chance:.3f}' for chance in found.conditional)} "
            f"by position, a draft in {100 * found.draft_rate:.0f} % of the steps ({found.source})"
            for key, found in self.acceptances.items()
        ]
        lines += [
            f"prefix cache of {model}: {100 * share:.1f} % of the prompt tokens were found"
            for model, share in self.prefix_hits.items()
        ]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the sections of a calibration file."""
        return {
            "acceptances": {key: asdict(found) for key, found in self.acceptances.items()},
            "prefix_hits": {model: round(share, 4) for model, share in self.prefix_hits.items()},
        }


def text_rates(runs: Sequence[MeasuredRun]) -> TextRates:
    """Pool what runs counted; those with random weights or synthetic acceptance have no text."""
    counts: dict[str, list[DraftCounts]] = {}
    cached: dict[str, list[tuple[float, float]]] = {}
    for run in (run for run in runs if run.has_text):
        name = load_model(run.model).name
        drafted = run.draft_counts()
        if drafted is not None:
            counts.setdefault(f"{name}/{run.config['decoding_type']}", []).append(drafted)
        if CACHED_TOKENS in run.measured:
            prompts = run.num_prompt_tokens()
            cached.setdefault(name, []).append((run.measured[CACHED_TOKENS], prompts))
    return TextRates(
        acceptances={key: _pooled(found) for key, found in sorted(counts.items())},
        prefix_hits={name: _ratio(found) for name, found in sorted(cached.items())},
    )


def _pooled(counts: Sequence[DraftCounts]) -> Acceptance:
    total = counts[0]
    for other in counts[1:]:
        total = total.plus(other)
    return replace(
        total.acceptance(), source=f"{total.num_drafts:.0f} drafts of {len(counts)} runs"
    )


def _ratio(found: Sequence[tuple[float, float]]) -> float:
    hits, tokens = np.sum(np.array(found), axis=0)
    return float(hits / tokens) if tokens else 0.0
