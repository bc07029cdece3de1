"""Token batches that show a calibration what the model's activations look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cost_models.errors import ProfileError

BATCH_SEQUENCES = 8
"""Sequences that are calibrated at once."""

FEWEST_TOKENS = 64
"""A calibration on less says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSize:
    """How much of the calibration file is used."""

    num_samples: int = 256
    """Sequences at most; ModelOpt's own example takes 512."""
    max_tokens: int = 512
    """Tokens of a sequence."""


def token_batches(texts: list[str], tokenizer: Any, size: CalibrationSize) -> list[Any]:
    """Return batches of token ids without padding: all texts joined, then cut into sequences.

    Padding would be calibrated as if it were text.

    Raises:
        ProfileError: The texts hold too few tokens.
    """
    import torch  # noqa: PLC0415  optional

    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= size.num_samples * size.max_tokens:
            break
    if len(ids) < FEWEST_TOKENS:
        raise ProfileError(
            f"the calibration data hold {len(ids)} tokens", hint=f"give {FEWEST_TOKENS} or more"
        )
    length = min(size.max_tokens, len(ids))
    rows = min(len(ids) // length, size.num_samples)
    tokens = torch.tensor(ids[: rows * length]).reshape(rows, length)
    return list(tokens.split(BATCH_SEQUENCES))
