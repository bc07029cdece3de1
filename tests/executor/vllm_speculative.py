"""What vLLM 0.25.1 refuses of `--speculative-config` (`vllm/config/speculative.py`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NEEDS_MODEL = {"draft_model", "eagle3", "medusa"}

KEYS: Mapping[str, type] = {
    "method": str,
    "num_speculative_tokens": int,
    "model": str,
    "prompt_lookup_max": int,
    "prompt_lookup_min": int,
    "rejection_sample_method": str,
    "synthetic_acceptance_rates": list,
}


def speculative_problem(given: Mapping[str, Any], *, config: Mapping[str, Any]) -> str:  # noqa: PLR0911
    """Return why it is refused; empty where it is taken.

    Args:
        given: The JSON.
        config: The target's config.json.
    """
    if unknown := set(given) - set(KEYS):
        return f"unexpected keyword arguments {sorted(unknown)}"
    if wrong := [key for key, value in given.items() if type(value) is not KEYS[key]]:
        return f"wrong types of {wrong}"
    method, count = given.get("method"), given.get("num_speculative_tokens", 0)
    if method not in {"ngram", "mtp", *NEEDS_MODEL}:
        return f"unknown method {method}"
    if count <= 0:
        return "num_speculative_tokens must be greater than zero"
    if (method in NEEDS_MODEL) is not bool(given.get("model")):
        return f"{method}: model is {given.get('model')!r}"
    if given.get("prompt_lookup_min", 1) > given.get("prompt_lookup_max", 1):
        return "prompt_lookup_min exceeds prompt_lookup_max"
    if method == "draft_model":
        draft = json.loads((Path(given["model"]) / "config.json").read_text())
        if draft["vocab_size"] != config["vocab_size"]:
            return "Target and draft model should have the same vocabulary size"
    return _synthetic_problem(given, count)


def _synthetic_problem(given: Mapping[str, Any], count: int) -> str:
    rates = given.get("synthetic_acceptance_rates")
    if (given.get("rejection_sample_method") == "synthetic") is (rates is None):
        return "synthetic acceptance needs both its keys"
    if rates is None:
        return ""
    if len(rates) != count or not all(0 <= rate <= 1 for rate in rates):
        return f"{count} rates from 0 to 1 are wanted, not {rates}"
    return "" if rates == sorted(rates, reverse=True) else "rates must be non-increasing"
