"""`planner quantize` and `planner quality` as a person runs them, up to the first weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from cost_models.errors import PlannerError
from engines.registry import find_engine, list_engines
from executor.quantization.schemes import SCHEMES
from planner.cli.plan import plan_command
from planner.cli.predict import predict_command
from planner.cli.quality import quality_command, quantize_command


def run(command: click.Command, *arguments: str) -> Any:
    return command.main(list(arguments), standalone_mode=False)


def test_the_list_tells_engine_and_gpus_of_every_scheme(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(quantize_command, "--list", "--json") == 0
    found = json.loads(capsys.readouterr().out)["schemes"]
    asked = "fp8 fp8_block int8_wo int8_sq int4_awq int4_gptq w4a8_awq nvfp4"
    assert set(asked.split()) <= set(found)
    assert found["nvfp4"]["sm"]["trtllm"] == [100, 103, 120]
    assert found["int4_gptq"]["sm"]["trtllm"] == []
    assert run(quantize_command, "--list") == 0
    text = capsys.readouterr().out
    assert "fp8_block: fp8_block in the form fp8" in text
    assert "trtllm        sm 90, 100, 103; tensorrt_llm/_torch/model_config.py" in text
    assert "trtllm        no: the PyTorch backend of 1.2 loads no GPTQ checkpoint" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("engine", list_engines())
def test_what_a_plan_may_recommend_is_what_the_engine_loads(engine: str) -> None:
    rules = find_engine(engine).rules.quantizations
    for row in SCHEMES.values():
        if row.quantization in rules and rules[row.quantization].searched:
            assert (engine in row.loaded_by) is rules[row.quantization].deployable, row.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --model"),
        (["--model", "m", "--scheme", "fp8"], "give --calibration-data"),
        (["--samples", "0"], "--samples 0: it must be at least 1"),
    ],
)
def test_what_is_missing_is_asked_for(given: list[str], message: str) -> None:
    whole = ["--model", "m", "--scheme", "fp8", "--calibration-data", "f", "--out", "o"]
    arguments = [*whole, *given] if "--samples" in given else given
    with pytest.raises(click.UsageError, match=message):
        run(quantize_command, *arguments)


def test_a_model_that_is_no_folder_is_named(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("one\ntwo\n")
    paths = ("--model", "nowhere", "--against", "nowhere", "--data", str(data))
    with pytest.raises(PlannerError, match="nowhere: not a folder"):
        run(quality_command, *paths, "--device", "cpu")
    with pytest.raises(PlannerError, match="'no-such-model' is unknown"):
        run(quality_command, *paths, "--install", "no-such-model")


def test_data_that_cannot_be_judged_on_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    paths = ("--model", "nowhere", "--against", "nowhere", "--data", str(data))
    for text, message in (
        ("", "holds no text"),
        ('{"txt": "a"}\n', r"text.jsonl:1: holds no text; give {\"text\": ...} a line"),
        ("no json\n", "text.jsonl:1: not JSON"),
        ('{"text": "a"}\n', "1 document; give 2 or more"),
    ):
        data.write_text(text)
        with pytest.raises(PlannerError, match=message):
            run(quality_command, *paths)


def test_a_negative_limit_is_refused() -> None:
    for command in (plan_command, predict_command):
        with pytest.raises(click.UsageError, match=r"-1\.0 is not in the range"):
            run(command, "--gpu", "h100", "--workload", "chat", "--max-quality-loss", "-1")


@pytest.mark.parametrize(("limit", "status", "state"), [("0.5", 1, "MISSED"), ("3", 0, "met")])
def test_a_prediction_says_whether_it_keeps_the_limit_on_quality(
    capsys: pytest.CaptureFixture[str], limit: str, status: int, state: str
) -> None:
    asked = ("--gpu", "h100", "--workload", "chat", "--max-quality-loss", limit)
    settings = ("--set", "quantization=fp8", "--set", "enable_chunked_prefill=true")
    assert run(predict_command, *asked, *settings) == status
    assert f"limit on quality quality_loss_pct: {state}" in capsys.readouterr().out
    assert run(predict_command, *asked, *settings, "--json") == status
    found = json.loads(capsys.readouterr().out)
    assert found["limits"]["quality_loss_pct"] == float(limit)
    assert (found["slo_excess"]["quality_loss_pct"] > 0) is (status == 1)
