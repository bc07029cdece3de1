"""Measuring, and every way in which it can fail: each ends in a stored run and a free machine."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.errors import MeasurementError
from executor.backend import Launch
from executor.backends.endpoint import EndpointBackend
from executor.backends.trtllm import TrtllmBackend
from executor.backends.trtllm_bench import TrtllmBenchBackend
from executor.backends.vllm import VllmBackend
from executor.case import Case, Measurement, MeasureOptions, PhaseLimits, Tools
from executor.machine import NvmlReader
from executor.measure import measure
from executor.protocols import ClosedLoop
from executor.repeats import RepeatRule
from executor.store import RunStore
from executor.traffic import Traffic, Warmth, warm_up_rounds, warmth_for
from tests.executor.conftest import STAND_INS
from tests.executor.openai_server import OpenAiServer
from tests.executor.test_backends import TRTLLM_OPTIONS, marked_processes, served
from tests.executor.test_machine import GIB, ScriptedGpu

TRAFFIC = Traffic(
    isl=[8] * 8,
    osl=[6] * 8,
    protocol=ClosedLoop(concurrency=2),
    workload={"protocol": "closed_loop", "concurrency": 2, "isl": 8, "osl": 6, "num_requests": 8},
)

WARM_UP_REQUESTS = sum(
    len(part.isl)
    for part in warm_up_rounds(TRAFFIC, warmth_for(TRAFFIC, max_batch_size=4), Warmth())
)

LIMITS = PhaseLimits(start_s=30.0, warm_up_s=30.0, run_s=30.0, silence_s=10.0, free_memory_s=0.0)

OPTIONS = MeasureOptions(limits=LIMITS, rule=RepeatRule(least=2, most=2), time_budget_s=120.0)

pytestmark = pytest.mark.usefixtures("stand_ins")


def wait_for(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen"
        time.sleep(0.02)


def tools(store: RunStore, **changes: Any) -> Tools:
    fields: dict[str, Any] = {
        "backend": VllmBackend(),
        "store": store,
        "reader": NvmlReader(0),
        "options": OPTIONS,
    }
    return Tools(**{**fields, **changes})


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "runs.db"))


@pytest.fixture
def case(deployment: Launch) -> Case:
    return Case(deployment=deployment, traffic=TRAFFIC, gpu="h200_sxm")


def only_run(measurement: Measurement, store: RunStore) -> dict[str, Any]:
    """The one run of a measurement, as it was stored; nothing of a server is left."""
    assert marked_processes() == set()
    assert [run.record for run in store.runs()] == list(measurement.records)
    assert len(measurement.records) == 1
    return dict(measurement.records[0])


def test_repeats_are_stored_with_everything_that_is_known(case: Case, store: RunStore) -> None:
    said: list[str] = []
    measurement = measure(
        replace(case, predicted={"tpot_ms.mean": {"value": 2.0}}),
        tools(store, progress=lambda what, _left_s: said.append(what)),
    )
    assert measurement.is_ok
    assert said == ["prepare", "start", "warm up", "run 1", "run 2", "stop"]
    first, second = store.runs()
    assert len(first.requests()) == 8
    assert first.record["measured"]["num_failed_requests"] == 0
    assert first.record["measured"]["kv_cache_tokens"] == 896912
    assert first.record["measured"]["num_preemptions"] == 8.0
    assert first.record["measured"]["steady"]["output_tok_per_s"] > 0
    assert first.record["predicted"] == {"tpot_ms.mean": {"value": 2.0}}
    assert first.record["machine"]["command"].startswith("vllm serve")
    assert first.record["config"]["max_batch_size"] == 4
    assert first.record["notes"] == "random weights"
    assert "limited" in first.record["client"]
    assert first.key == second.key
    assert marked_processes() == set()


def test_what_is_measured_is_not_measured_again(case: Case, store: RunStore) -> None:
    measure(case, tools(store))
    again = measure(case, tools(store, progress=lambda what, _: pytest.fail(what)))
    assert (again.num_resumed, len(again.records)) == (2, 2)
    other = replace(case, deployment=replace(case.deployment, options={"arguments": "--x"}))
    assert other.key(VllmBackend()) != case.key(VllmBackend())


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        ("out_of_memory_at_start", "out_of_memory", "Tried to allocate 96.00 GiB"),
        ("crashes_at_start", "crashed_at_start", "architecture is not supported"),
        ("never_answers", "start_timed_out", "no answer within "),
        ("is_short", "wrong_length", "8 of 8 requests wrong_length: 5 tokens, not 6"),
    ],
)
def test_a_server_that_fails_is_a_stored_run(
    case: Case,
    store: RunStore,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
    status: str,
    words: str,
) -> None:
    monkeypatch.setenv("STAND_IN_FAILURE", failure)
    # The time budget bounds the start too.
    options = replace(OPTIONS, time_budget_s=1.0 if failure == "never_answers" else 60.0)
    run = only_run(measure(case, tools(store, options=options)), store)
    assert run["status"] == status
    assert words in run["error"]
    assert run["machine"]["command"].startswith("vllm serve")


def test_who_waits_for_a_start_is_told_that_it_goes_on(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILURE", "never_answers")
    monkeypatch.setattr("executor.session.TICK_INTERVAL_S", 0.2)
    said: list[str] = []
    measure(
        case,
        tools(
            store,
            options=replace(OPTIONS, time_budget_s=1.5),
            progress=lambda what, _left_s: said.append(what),
        ),
    )
    assert said[:2] == ["prepare", "start"]
    assert "start goes on" in said


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        ("dies", "crashed", "ended by SIGKILL"),
        ("runs_out_of_memory", "out_of_memory", "CUDA out of memory"),
        ("hangs", "hung", "silent for 1 s"),
    ],
)
def test_a_server_that_fails_in_the_middle_keeps_what_came_before(
    case: Case,
    store: RunStore,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
    status: str,
    words: str,
) -> None:
    monkeypatch.setenv("STAND_IN_FAILURE", failure)
    monkeypatch.setenv("STAND_IN_FAILS_AFTER", str(WARM_UP_REQUESTS + 4))
    options = replace(OPTIONS, limits=replace(LIMITS, silence_s=1.0))
    run = only_run(measure(case, tools(store, options=options)), store)
    assert run["status"] == status
    assert words in run["error"]
    requests = store.runs()[0].requests()
    # The requests that were on their way when the server died ended in the middle.
    assert sum("status" not in line for line in requests) in (3, 4)


def test_a_server_that_dies_in_the_warm_up(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILURE", "dies")
    monkeypatch.setenv("STAND_IN_FAILS_AFTER", "2")
    run = only_run(measure(case, tools(store)), store)
    assert run["status"] == "crashed"
    assert run["error"].startswith("warm-up: ")


def test_a_connection_that_breaks_is_a_lost_one(case: Case, store: RunStore) -> None:
    server = OpenAiServer(failure="breaks_connections", fails_after=WARM_UP_REQUESTS + 3)
    with served(server) as url:
        wanted = replace(case.deployment, options={"url": url})
        result = measure(replace(case, deployment=wanted), tools(store, backend=EndpointBackend()))
    run = only_run(result, store)
    assert run["status"] == "lost_connection"
    assert run["engine"] == "endpoint"


def test_a_time_budget_that_is_spent_ends_the_run(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.drive.TICK_INTERVAL_S", 0.3)
    said: list[str] = []
    slow = replace(TRAFFIC, osl=[4000] * 8, workload={**TRAFFIC.workload, "osl": 4000})
    options = replace(OPTIONS, limits=replace(LIMITS, run_s=1.0))
    told = tools(store, options=options, progress=lambda what, _left_s: said.append(what))
    run = only_run(measure(replace(case, traffic=slow), told), store)
    assert run["status"] == "out_of_time"
    assert "run 1 goes on" in said


def test_a_repeat_that_the_budget_would_cut_off_is_not_begun(case: Case, store: RunStore) -> None:
    slow = replace(TRAFFIC, osl=[150] * 8, workload={**TRAFFIC.workload, "osl": 150})
    options = replace(OPTIONS, rule=RepeatRule(least=90, most=90), time_budget_s=6.0)
    measurement = measure(replace(case, traffic=slow), tools(store, options=options))
    assert measurement.is_ok
    assert 0 < len(measurement.records) < 90


def test_a_warm_up_ends_at_its_limit_and_the_runs_go_on(case: Case, store: RunStore) -> None:
    slow = replace(TRAFFIC, osl=[60] * 8, workload={**TRAFFIC.workload, "osl": 60})
    limits, rule = replace(LIMITS, warm_up_s=1.0), RepeatRule(least=1, most=1)
    options = replace(OPTIONS, limits=limits, rule=rule)
    server = OpenAiServer(gap_s=0.02)  # a request takes more than a second
    with served(server) as url:
        wanted = replace(case.deployment, options={"url": url})
        measurement = measure(
            replace(case, deployment=wanted, traffic=slow),
            tools(store, options=options, backend=EndpointBackend()),
        )
    assert measurement.is_ok
    assert server.num_broken_off > 0
    assert server.num_completions < len(TRAFFIC.isl) + WARM_UP_REQUESTS


def test_a_build_that_takes_too_long_is_a_stored_run(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "packages"))
    wanted = replace(
        case.deployment,
        model=replace(case.deployment.model, has_random_weights=False),
        build_script="sleep 600",
    )
    options = replace(OPTIONS, limits=replace(LIMITS, prepare_s=1.0))
    told = tools(store, options=options, backend=TrtllmBackend())
    run = only_run(measure(replace(case, deployment=wanted), told), store)
    assert run["status"] == "prepare_failed"
    assert "did not end within 1 s" in run["error"]


def test_a_benchmark_that_never_ends_is_a_stored_run(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "packages"))
    monkeypatch.setenv("STAND_IN_FAILURE", "never_ends")
    wanted = replace(case.deployment, engine_options=TRTLLM_OPTIONS)
    options = replace(OPTIONS, limits=replace(LIMITS, run_s=2.0))
    told = tools(store, options=options, backend=TrtllmBenchBackend())
    run = only_run(measure(replace(case, deployment=wanted), told), store)
    assert run["status"] == "hung"


def test_a_stall_of_the_whole_engine_is_flagged(case: Case, store: RunStore) -> None:
    server = OpenAiServer(gap_s=0.005, failure="stalls", fails_after=WARM_UP_REQUESTS + 4)
    with served(server) as url:
        wanted = replace(case.deployment, options={"url": url})
        result = measure(replace(case, deployment=wanted), tools(store, backend=EndpointBackend()))
    stalled, smooth = result.records
    assert "stalled" in stalled["flags"]
    assert stalled["measured"]["longest_stall_ms"] >= 900
    assert "stalled" not in smooth.get("flags", ())


def test_a_client_that_was_held_up_is_flagged(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.drive.TICK_INTERVAL_S", 0.1)

    def hold_up(what: str, _left_s: float) -> None:
        if what.endswith("goes on"):
            time.sleep(0.2)

    slow = replace(TRAFFIC, osl=[80] * 8, workload={**TRAFFIC.workload, "osl": 80})
    result = measure(replace(case, traffic=slow), tools(store, progress=hold_up))
    assert "client_limited" in result.records[0]["flags"]
    assert result.records[0]["client"]["loop_lag_ms"]["p99"] > 50


def test_memory_that_stays_in_use_is_a_failure_of_its_own(case: Case, store: RunStore) -> None:
    gpu = ScriptedGpu(used_bytes=[0.0, 60 * GIB])
    measurement = measure(case, tools(store, reader=gpu))
    assert [record["status"] for record in measurement.records] == ["ok", "ok", "not_ended"]
    assert "GPU memory in use" in measurement.records[-1]["error"]


def test_a_store_that_takes_nothing_ends_the_measurement_and_keeps_the_run(
    case: Case, tmp_path: Path
) -> None:
    path = tmp_path / "runs.db"
    store = RunStore(str(path), lock_wait_s=0.1)
    other = sqlite3.connect(path, check_same_thread=False)

    def lock(what: str, _left_s: float) -> None:
        if what == "run 1":
            other.execute("BEGIN EXCLUSIVE")

    with pytest.raises(MeasurementError, match="locked"):
        measure(case, tools(store, progress=lock))
    assert marked_processes() == set()
    other.rollback()
    other.close()
    assert [run.status for run in RunStore(str(path)).runs()] == ["ok"]


def test_a_throttled_and_shared_gpu_is_flagged(case: Case, store: RunStore) -> None:
    gpu = ScriptedGpu(used_bytes=[5 * GIB], throttle_bits=0x8)
    measurement = measure(case, tools(store, reader=gpu))
    flags = measurement.records[0]["flags"]
    assert {"throttled", "shared_gpu"} <= set(flags)
    assert measurement.records[0]["machine"]["throttle_fraction"] == {"hw_slowdown": 1.0}


def test_prompts_from_a_cache_are_flagged(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cached_prompts" not in measure(case, tools(store)).records[0].get("flags", ())
    monkeypatch.setenv("STAND_IN_CACHED_TOKENS", "4")
    shared = replace(TRAFFIC, shared_prefix_tokens=4)
    for traffic, is_flagged in ((TRAFFIC, True), (shared, False)):
        wanted = replace(case, traffic=replace(traffic, workload={"of": str(is_flagged)}))
        record = measure(wanted, tools(store)).records[0]
        assert ("cached_prompts" in record.get("flags", ())) is is_flagged


def test_cases_behind_one_server_share_no_prompt(case: Case, store: RunStore) -> None:
    server = OpenAiServer()
    with served(server) as url:
        alive = replace(case, deployment=replace(case.deployment, options={"url": url}))
        for clients in (2, 4):
            workload = {**TRAFFIC.workload, "concurrency": clients}
            traffic = replace(TRAFFIC, workload=workload)
            measure(replace(alive, traffic=traffic), tools(store, backend=EndpointBackend()))
    prompts = [tuple(body["prompt"]) for body in server.bodies if len(body["prompt"]) == 8]
    assert len(prompts) >= 4 * len(TRAFFIC.isl)
    assert len(set(prompts)) == len(prompts)


def test_the_engines_own_benchmark_is_measured_too(
    case: Case, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "packages"))
    wanted = replace(case.deployment, engine_options=TRTLLM_OPTIONS)
    measurement = measure(
        replace(case, deployment=wanted), tools(store, backend=TrtllmBenchBackend())
    )
    assert measurement.is_ok
    assert len(store.runs()[0].requests()) == 8
    assert measurement.records[0]["measured"]["tpot_ms"]["p99"] == 10.0
    assert measurement.records[0]["engine"] == "trtllm"


PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
from executor.case import Case
from executor.measure import measure
from executor.store import RunStore
from tests.executor import test_measure as here
from tests.executor.conftest import tiny_deployment
folder = Path(sys.argv[1])
case = Case(deployment=tiny_deployment(folder), traffic=here.TRAFFIC, gpu="h200_sxm")
store = RunStore(str(folder / "runs.db"))
options = replace(here.OPTIONS, rule=replace(here.OPTIONS.rule, least=3, most=3))
try:
    say = lambda what, _left_s: print(what, flush=True)
    measure(case, here.tools(store, options=options, progress=say))
except KeyboardInterrupt:
    sys.exit(130)
"""


def measuring(tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if said.strip() == line:
            return
    pytest.fail(f"never said {line}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["start", "warm up", "run 2"])
def test_an_interrupt_stores_what_there_is_and_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, moment: str
) -> None:
    failure = "never_answers" if moment == "start" else "hangs"
    after = {"start": 0, "warm up": 3, "run 2": WARM_UP_REQUESTS + 8 + 3}[moment]
    monkeypatch.setenv("STAND_IN_FAILURE", failure)
    monkeypatch.setenv("STAND_IN_FAILS_AFTER", str(after))
    with measuring(tmp_path) as process:
        read_until(process, moment)
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(30) == 130
    statuses = [run.status for run in RunStore(str(tmp_path / "runs.db")).runs()]
    assert statuses == (["ok"] if moment == "run 2" else []) + ["interrupted"]
    wait_for(lambda: not marked_processes())


def test_a_killed_campaign_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "runs.db")
    monkeypatch.setenv("STAND_IN_FAILURE", "hangs")
    monkeypatch.setenv("STAND_IN_FAILS_AFTER", str(WARM_UP_REQUESTS + 8 + 3))
    with measuring(tmp_path) as process:
        read_until(process, "run 2")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    assert [run.status for run in RunStore(path).runs()] == ["ok"]
    wait_for(lambda: not marked_processes())
    monkeypatch.delenv("STAND_IN_FAILURE")
    monkeypatch.delenv("STAND_IN_FAILS_AFTER")
    with measuring(tmp_path) as process:
        read_until(process, "run 2")
        assert process.wait(60) == 0
    assert [run.status for run in RunStore(path).runs()] == ["ok"] * 3


def test_requests_that_restrict_their_tokens_are_flagged(case: Case, store: RunStore) -> None:
    wanted = replace(case.deployment, options={"request": '{"allowed_token_ids": [1, 2]}'})
    result = measure(replace(case, deployment=wanted), tools(store))
    assert all("token_mask" in record["flags"] for record in result.records)
    free = measure(case, tools(store))
    assert not any("token_mask" in record.get("flags", ()) for record in free.records)
