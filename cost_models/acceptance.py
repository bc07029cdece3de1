"""How often draft tokens are right: a property of the text and of two models, not a knob.

A step verifies k draft tokens and keeps those before the first wrong one, then one token of the
target's own. With a_i the chance that token i is right once all before it are, a step yields
1 + Σ_j Π_{i≤j} a_i tokens on average; for equal a_i that is (1 − a^(k+1))/(1 − a) (Leviathan et
al. 2023, arXiv:2211.17192, equation 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from cost_models.errors import ConfigError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Drafts of one scheme on one text."""

    conditional: tuple[float, ...]
    """Chance that draft token i is right where all before it are; the last holds for all after."""
    draft_rate: float = 1.0
    """Share of the steps in which a sequence has a draft at all: n-grams do not always match."""
    draft_tokens: float = 0.0
    """Mean length of a draft; 0: always as long as the engine allows."""
    source: str = ""
    """Where the numbers come from."""
    spread: float = 0.0
    """Half width of the 90 % interval of each chance; 0 where the text itself told them."""

    @property
    def is_prior(self) -> bool:
        """Whether this text was never seen."""
        return self.spread > 0

    def survival(self, max_draft_len: int) -> FloatArray:
        """Return the chance that tokens 1 to k of a draft are all right, for each k."""
        last = self.conditional[-1:]
        chances = (self.conditional + last * max_draft_len)[:max_draft_len]
        return np.asarray(np.cumprod(chances), np.float64)

    def tokens_per_step(self, max_draft_len: int) -> float:
        """Return the mean tokens that one step yields for a sequence."""
        return 1.0 + self.draft_rate * float(self.survival(max_draft_len).sum())

    def verified(self, max_draft_len: int) -> float:
        """Return the mean draft tokens that one step verifies for a sequence."""
        return self.draft_rate * min(self.draft_tokens or max_draft_len, max_draft_len)

    def distribution(self, max_draft_len: int) -> FloatArray:
        """Return the probabilities that a step yields 1, 2, … k + 1 tokens."""
        at_least = np.concatenate([[1.0], self.draft_rate * self.survival(max_draft_len), [0.0]])
        return np.asarray(-np.diff(at_least))

    def steps_for(self, tokens: IntArray, max_draft_len: int, rng: np.random.Generator) -> IntArray:
        """Draw the steps that each sequence needs for so many tokens, step by step."""
        outcomes = np.arange(1, max_draft_len + 2)
        chances = self.distribution(max_draft_len)
        left = np.array(tokens, np.int64)
        steps = np.zeros_like(left)
        while (open_rows := np.flatnonzero(left > 0)).size:
            steps[open_rows] += 1
            left[open_rows] -= rng.choice(outcomes, size=open_rows.size, p=chances)
        return steps

    def shifted(self, share: float) -> Acceptance:
        """Return the same with every chance moved by a share of its spread."""
        moved = (min(max(a + share * self.spread, 0.0), 1.0) for a in self.conditional)
        return replace(self, conditional=tuple(moved))


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """What an engine counted of its drafts."""

    accepted_at: tuple[float, ...]
    """Drafts whose token was kept, by position."""
    num_drafts: float
    """Drafts verified."""
    num_draft_tokens: float
    """Tokens in them."""
    num_tokens: float
    """Tokens that decode steps made."""

    def plus(self, other: DraftCounts) -> DraftCounts:
        """Return the counts of both."""
        positions = zip_longest(self.accepted_at, other.accepted_at, fillvalue=0.0)
        return DraftCounts(
            accepted_at=tuple(one + two for one, two in positions),
            num_drafts=self.num_drafts + other.num_drafts,
            num_draft_tokens=self.num_draft_tokens + other.num_draft_tokens,
            num_tokens=self.num_tokens + other.num_tokens,
        )

    def acceptance(self) -> Acceptance:
        """Return the rates; a step makes the tokens that were accepted, and one more."""
        accepted = np.array(self.accepted_at, np.float64)
        reached = np.concatenate([[self.num_drafts], accepted[:-1]])
        chances = np.divide(accepted, reached, out=np.zeros_like(accepted), where=reached > 0)
        steps = max(self.num_tokens - float(accepted.sum()), self.num_drafts)
        return Acceptance(
            conditional=tuple(np.clip(chances, 0.0, 1.0).tolist()),
            draft_rate=self.num_drafts / steps,
            draft_tokens=self.num_draft_tokens / self.num_drafts,
            source="counted by the engine",
        )


PRIORS: Mapping[str, Acceptance] = {
    "NGram": Acceptance(
        conditional=(0.45, 0.6, 0.7),
        draft_rate=0.5,
        source="prior: prompt lookup in open chat, Spec-Bench, arXiv:2401.07851",
        spread=0.25,
    ),
    "DraftTarget": Acceptance(
        conditional=(0.65,),
        source="prior: Leviathan et al. 2023, table 2 (0.53 to 0.75)",
        spread=0.12,
    ),
    "Eagle": Acceptance(
        conditional=(0.7, 0.65),
        source="prior: EAGLE-3, arXiv:2503.01840, chains of drafts",
        spread=0.12,
    ),
    "MTP": Acceptance(
        conditional=(0.85, 0.75, 0.7),
        source="prior: DeepSeek-V3, arXiv:2412.19437, section 5.4.3 (0.85 to 0.90 for the first)",
        spread=0.1,
    ),
    "Medusa": Acceptance(
        conditional=(0.6, 0.5),
        source="prior: Medusa, arXiv:2401.10774, top-1 accuracy of the heads",
        spread=0.15,
    ),
}
"""What is believed of a text that nobody has seen, by decoding type.

Round figures of the order that the named papers report, not values of a table; texts differ more
than the figures' last digit, which the spreads stand for.
"""


def stated_chances(text: str, max_draft_len: int) -> tuple[float, ...]:
    """Return the chances of an option such as `0.8,0.7,0.6`, one for each draft token.

    Raises:
        ConfigError: Not so many numbers from 0 to 1.
    """
    try:
        chances = tuple(float(part) for part in text.split(","))
    except ValueError:
        chances = ()
    if len(chances) != max_draft_len or not all(0 <= chance <= 1 for chance in chances):
        raise ConfigError(
            f"synthetic_acceptance={text}",
            hint=f"give max_draft_len={max_draft_len} numbers from 0 to 1",
        )
    return chances


def believed(decoding_type: str, known: Mapping[str, Acceptance]) -> Acceptance:
    """Return the acceptance of a scheme: what is known of the text, else a prior.

    Raises:
        ConfigError: Unknown decoding type.
    """
    if decoding_type in known:
        return known[decoding_type]
    if decoding_type not in PRIORS:
        raise ConfigError(
            f"decoding_type={decoding_type} is unknown", hint=f"known: {', '.join(PRIORS)}"
        )
    return PRIORS[decoding_type]
