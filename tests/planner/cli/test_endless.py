"""Inputs under which a prediction once had no end: short limits, long waits, refused prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "data" / "endless"

LIMIT_S = 60
"""Far more than any of these takes."""


def predict(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of `planner predict`, which must end."""
    found = subprocess.run(
        [sys.executable, "-m", "planner", "predict", "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert found.returncode in (0, 1), found.stderr
    return found.returncode, json.loads(found.stdout)


def value(found: dict[str, Any], metric: str) -> float:
    return float(found["predicted"][metric]["value"])


def test_sequences_as_short_as_the_limit_end() -> None:
    workload = str(DATA / "short_sequences.json")
    status, found = predict("--gpu", "h100", "--model", "llama-3.1-8b", "--workload", workload)
    assert status == 0
    assert 25.5 <= value(found, "ttft_ms.mean") <= 27.6
    assert value(found, "tpot_ms.mean") == pytest.approx(7.0, abs=0.1)


def test_requests_an_hour_apart_end() -> None:
    workload = str(DATA / "an_hour_apart.jsonl")
    status, found = predict("--gpu", "h100", "--model", "llama-3.1-8b", "--workload", workload)
    assert status == 0
    assert value(found, "tpot_ms.mean") == pytest.approx(7.0, abs=0.1)


@pytest.mark.parametrize(
    ("gpu", "isl", "osl", "rate_per_s"),
    [
        ("h100", 256, 128, 0.5),
        ("h200", 256, 128, 4.0),
        ("h200", 512, 128, 2.0),
        ("a100", 384, 128, 1.0),
        ("b200", 512, 128, 0.5),
    ],
)
def test_every_short_limit_ends(
    tmp_path: Path, gpu: str, isl: int, osl: int, rate_per_s: float
) -> None:
    arrival = {"process": "poisson", "rate_per_s": rate_per_s}
    data = {"schema_version": 1, "name": "short", "arrival": arrival, "isl": isl, "osl": osl}
    path = tmp_path / "short.json"
    path.write_text(json.dumps(data))
    status, found = predict("--gpu", gpu, "--model", "llama-3.1-8b", "--workload", str(path))
    assert status == 0
    assert 0 < value(found, "tpot_ms.mean") < 20


def test_refused_prompts_end_the_search_for_a_rate_at_once() -> None:
    status, found = predict("--gpu", "h100", "--workload", "chat", "--find-rate")
    assert status == 1
    assert found["found_rate_per_s"] == 0
    assert [refused["limit"] for refused in found["refusals"]] == ["max_num_tokens"]
    accepted = found["refusals"][0]["accepted_from"]
    longer = ("--set", f"max_num_tokens={accepted}")
    assert predict("--gpu", "h100", "--workload", "chat", *longer)[0] == 0
