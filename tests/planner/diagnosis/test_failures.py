"""Failures that real server processes were made to have, diagnosed from the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.engine import EngineConfig
from engines.registry import find_engine
from executor.backend import Launch
from executor.backends.endpoint import EndpointBackend
from executor.backends.vllm import VllmBackend
from executor.case import Case, MeasureOptions, Tools
from executor.machine import NvmlReader
from executor.measure import measure
from executor.repeats import RepeatRule
from executor.store import RunStore
from planner.api import diagnose
from planner.diagnosis.finding import Diagnosis, Finding
from tests.executor.conftest import TINY_MODEL, stand_ins, tiny_deployment
from tests.executor.openai_server import OpenAiServer
from tests.executor.test_backends import served
from tests.executor.test_measure import LIMITS, TRAFFIC, WARM_UP_REQUESTS

__all__ = ["stand_ins"]

LLAMA_70B = replace(TINY_MODEL, name="meta-llama/Llama-3.1-70B-Instruct")

CONFIG = replace(
    EngineConfig(**find_engine("vllm").defaults),
    max_batch_size=4, max_num_tokens=8192, max_seq_len=8192,
)  # fmt: skip

DURING_THE_RUN = WARM_UP_REQUESTS + 4

Measure = Callable[..., Diagnosis]

pytestmark = pytest.mark.usefixtures("stand_ins")


def diagnosed(folder: Path, deployment: Launch, tools: Tools) -> Diagnosis:
    case = Case(deployment=deployment, traffic=TRAFFIC, gpu="h100_sxm")
    (record,) = measure(case, tools).records
    (diagnosis,) = diagnose(str(record["run_id"]), store=str(folder / "runs.db"))
    return diagnosis


def tools_of(folder: Path, **changes: object) -> Tools:
    options = MeasureOptions(
        limits=replace(LIMITS, silence_s=1.0), rule=RepeatRule(least=1, most=1), time_budget_s=60.0
    )
    fields = {
        "backend": VllmBackend(),
        "store": RunStore(str(folder / "runs.db")),
        "reader": NvmlReader(0),
        "options": options,
    }
    return Tools(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Measures a stand-in that fails in a named way, and diagnoses what was stored."""

    def fail(failure: str, *, budget_s: float = 60.0, after: int = 0) -> Diagnosis:
        monkeypatch.setenv("STAND_IN_FAILURE", failure)
        monkeypatch.setenv("STAND_IN_FAILS_AFTER", str(after))
        deployment = tiny_deployment(tmp_path / "work", model=LLAMA_70B, config=CONFIG)
        tools = tools_of(tmp_path)
        options = replace(tools.options, time_budget_s=budget_s)
        return diagnosed(tmp_path, deployment, replace(tools, options=options))

    return fail


def only_cause(diagnosis: Diagnosis) -> Finding:
    explaining = [ranked.finding for ranked in diagnosis.findings if ranked.share == 1.0]
    (finding,) = explaining
    return finding


def test_memory_that_ran_out_is_counted_in_bytes_and_remedied(failing: Measure) -> None:
    found = only_cause(failing("out_of_memory_at_start"))
    assert found.cause == "out_of_memory"
    assert f"{96 * 2**30:,} bytes" in found.words
    # 70.6 billion parameters of two bytes: 131.4 GiB.
    assert any("weights 131.4" in line for line in found.evidence)
    assert found.remedies
    for remedy in found.remedies:
        assert "GiB are needed" in remedy.note


@pytest.mark.parametrize(
    ("failure", "after", "cause", "words"),
    [
        ("crashes_at_start", 0, "build_failure", "does not know the model's architecture"),
        ("never_answers", 0, "ended_badly", "did not answer within the time for its start"),
        ("is_short", 0, "ended_badly", "another number of tokens"),
        ("dies", DURING_THE_RUN, "ended_badly", "died while requests were in flight"),
        ("hangs", DURING_THE_RUN, "ended_badly", "nothing came within the limit"),
        ("runs_out_of_memory", DURING_THE_RUN, "out_of_memory", "out of memory"),
    ],
)
def test_each_way_to_fail_has_its_words(
    failing: Measure, failure: str, after: int, cause: str, words: str
) -> None:
    diagnosis = failing(failure, budget_s=1.5 if failure == "never_answers" else 60.0, after=after)
    assert diagnosis.complaints[0].words.startswith(f"failed ({diagnosis.status})")
    found = only_cause(diagnosis)
    assert (found.cause, words in found.words) == (cause, True)
    assert found.remedies


def test_connections_that_break_are_told_from_an_engine_that_dies(tmp_path: Path) -> None:
    server = OpenAiServer(failure="breaks_connections", fails_after=WARM_UP_REQUESTS + 3)
    with served(server) as url:
        deployment = tiny_deployment(
            tmp_path / "work", model=LLAMA_70B, config=CONFIG, options={"url": url}
        )
        diagnosis = diagnosed(tmp_path, deployment, tools_of(tmp_path, backend=EndpointBackend()))
    found = only_cause(diagnosis)
    assert found.words == "connections broke while the engine lived"
    assert any("lost" in line for line in found.evidence)
