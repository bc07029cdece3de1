"""What shipped runs record of a configuration is what their stored command says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.engine import KNOBS, EngineConfig
from cost_models.profile_io import load_model
from engines.registry import find_engine
from planner.workloads.measured import parse_run

ROOT = Path(__file__).parents[2]

FILES = sorted(
    path
    for folder in ("docs", "profiles/runs")
    for path in (ROOT / folder).rglob("*.jsonl")
    if '"command": "vllm serve' in path.read_text()
)


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command line: words that start with dashes, and what follows."""
    options: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            is_switch = following.startswith("--")
            options[word[2:]] = True if is_switch else _number(following)
    return options


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def recorded(path: Path) -> Iterator[tuple[str, EngineConfig, dict[str, Any]]]:
    """Yield (run id, recorded configuration, options of the stored command)."""
    for line in path.read_text().splitlines():
        data = json.loads(line)
        command = shlex.split((data.get("machine") or {}).get("command") or "")
        if command[:2] == ["vllm", "serve"]:
            run = parse_run(data, path.parent)
            yield run.run_id, run.engine_config(), options_of(command[3:])


@pytest.mark.skipif(not FILES, reason="runs are not part of an installation")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recorded_configuration_agrees_with_its_command(path: Path) -> None:
    spec, model = find_engine("vllm"), load_model("llama-3.1-8b")
    found = list(recorded(path))
    assert found
    for run_id, config, options in found:
        base = replace(EngineConfig(**spec.defaults), quantization=config.quantization)
        said, _ = spec.read_options(options, base)
        # A draft lies in a folder of its host, whatever it is called elsewhere.
        said = replace(said, speculative_model=config.speculative_model)
        left = {
            knob: (getattr(config, knob), getattr(said, knob))
            for knob in KNOBS
            if spec.options(replace(said, **{knob: getattr(config, knob)}), model)
            != spec.options(said, model)
        }
        assert not left, run_id
