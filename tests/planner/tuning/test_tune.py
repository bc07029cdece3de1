"""`planner tune` with real processes: a study that ends, resumes, and is shared by hosts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from cost_models.calibration_io import engine_constants_to_json
from cost_models.profile_io import load_gpu
from engines.registry import load_calibration
from executor.store import RunStore
from planner import api
from planner.tuning.pool import make_pool, measured_log_score
from planner.workloads.demand import workload_demand
from tests.executor.conftest import DATA, STAND_INS
from tests.executor.test_backends import marked_processes

ROOT = Path(__file__).parents[3]

WORKER = """
import sys
from planner.question import (PlanRequest)
from planner.measuring.request import (MeasureRequest)
from planner.tuning.tune import TuneRequest, tune

workload, calibration, store, workdir = sys.argv[1:]
tuned = tune(TuneRequest(
    plan=PlanRequest(gpu="h200", workload=workload, engine="vllm", trials=4,
                     calibration=calibration,
                     pins={"quantization": "fp8", "kv_cache_dtype": "bf16"},
                     limits={"max_batch_size": "16,32", "max_num_tokens": "1024,8192"}),
    measure=MeasureRequest(backend="vllm", workload=workload, gpu="h200", random_weights=True,
                           repeats=1, store=store, workdir=workdir),
    time_budget_s=150.0, smallest_gain=0.0, heartbeat_s=3,
    said=lambda line: print(line, flush=True),
))
print(tuned.reason)
"""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def workload(folder: Path) -> str:
    """One in which larger batches are predicted to be a little better."""
    few: dict[str, Any] = json.loads((DATA / "few.json").read_text())
    few["arrival"] |= {"concurrency": 24, "num_requests": 24}
    (folder / "few.json").write_text(json.dumps(few))
    return str(folder / "few.json")


def unsure(folder: Path) -> str:
    """A calibration of which little is known: every candidate may still be the best."""
    content = engine_constants_to_json(load_calibration(load_gpu("h200"), "vllm"))
    content["intervals"] = {
        name: {**known, "log_q05": -2.0, "log_q95": 2.0}
        for name, known in content["intervals"].items()
    }
    (folder / "unsure.json").write_text(json.dumps(content))
    return str(folder / "unsure.json")


def cli(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    program = "from planner.cli.main import main; main()"
    fixed = (
        "tune", "--gpu", "h200", "--backend", "vllm", "--random-weights",
        "--workload", workload(folder), "--json", "--pin", "quantization=fp8",
        "--limit", "max_num_tokens=1024,8192",
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program, *fixed, *arguments],
        cwd=folder, env=environment(**more), capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip


def test_it_measures_the_plans_choice_first_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = cli(tmp_path, "--min-gain", "0.2")
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert "plan's choice" in found["tried"][0]["label"]
    assert found["expected_gain"] < 0.2
    assert found["reason"]
    assert found["best"]["measured"] > 0
    # The backend's own engine is planned for.
    assert found["best"]["config"]["capacity_scheduler_policy"] == "RECOMPUTE"
    again = cli(tmp_path, "--min-gain", "0.2")
    resumed = json.loads(again.stdout)
    assert resumed["tried"][0] == found["tried"][0]
    other = cli(tmp_path, "--min-gain", "0.2", "--objective", "latency")
    assert other.returncode == 2
    assert "another question or calibration; give another --study" in other.stderr


def test_an_engine_that_is_not_there_is_said_before_anything_is_tried(tmp_path: Path) -> None:
    result = cli(tmp_path, PATH="/usr/bin:/bin")
    assert result.returncode == 3
    assert "vllm is not installed; pip install" in result.stderr
    assert not list(tmp_path.glob("*.db"))


def test_an_open_loop_is_measured_where_configurations_differ(tmp_path: Path) -> None:
    asked = json.loads((DATA / "few.json").read_text())
    asked["arrival"] = {"process": "poisson", "rate_per_s": 1.0, "num_requests": 6}
    asked |= {"slo": {"tpot_ms.mean": 20.0}, "objective": "goodput"}
    (tmp_path / "open.json").write_text(json.dumps(asked))
    result = cli(tmp_path, "--workload", str(tmp_path / "open.json"), "--min-gain", "0.9")
    assert result.returncode == 0, result.stderr
    rate = float(re.search(r"measured at ([\d.e+]+) requests/s", result.stderr)[1])  # type: ignore[index]
    assert rate > 10
    with closing(RunStore(str(tmp_path / "planner-runs.db"))) as store:
        assert store.runs()[0].record["workload"]["rate_per_s"] == pytest.approx(rate)


def test_what_does_not_fit_teaches_and_is_not_tried_again(tmp_path: Path) -> None:
    result = cli(
        tmp_path, "--limit", "max_batch_size=8,16", STAND_IN_FAILURE="out_of_memory_at_start"
    )
    assert result.returncode == 3
    found = json.loads(result.stdout)
    assert {tried["failure"] for tried in found["tried"]} == {"out_of_memory"}
    assert found["best"] is None
    labels = Counter(tried["label"] for tried in found["tried"])
    assert max(labels.values()) == 1
    assert marked_processes() == set()


def test_three_hosts_share_a_study_and_one_dies(postgresql: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", WORKER, workload(tmp_path), unsure(tmp_path), postgresql]
    workers = [
        subprocess.Popen(
            [*arguments, str(tmp_path / f"work{number}")],
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    try:
        victim = workers[0]
        assert victim.stdout is not None
        assert "next:" in victim.stdout.readline()
        time.sleep(0.5)
        victim.send_signal(signal.SIGKILL)
        outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert [worker.returncode for worker in workers[1:]] == [0, 0], outputs
    url = postgresql.replace("postgresql://", "postgresql+psycopg://")
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name="tune", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    done = [t for t in trials if t.state is TrialState.COMPLETE]
    times = Counter(t.params["candidate"] for t in done)
    assert len(done) >= 3
    assert max(times.values()) == 1, "two hosts measured the same"
    # Its trial is the one that neither ended nor says why it failed.
    lost = [t for t in trials if t.value is None and "failure" not in t.user_attrs]
    assert len(lost) <= 1


def test_the_pool_has_the_best_first_and_differs(tmp_path: Path) -> None:
    few = workload(tmp_path)
    request = api.PlanRequest(
        gpu="h100", workload=few, engine="vllm", trials=4, limits={"max_batch_size": "16,32"}
    )
    problem = api.requested_problem(request)
    demand = workload_demand(problem.workload)
    pool = make_pool(problem, request, demand, objective="throughput")
    again = make_pool(problem, request, demand, objective="throughput")
    assert pool.key == again.key
    assert len(set(pool.configs)) == len(pool.configs) >= 8
    assert pool.configs[pool.default].tokens_per_block == 16
    assert len({config.tokens_per_block for config in pool.configs}) > 1
    assert (pool.distances == pool.distances.T).all()
    assert (pool.log_sd > 0).all()


def test_a_run_is_scored_like_its_prediction() -> None:
    measured = {"output_tok_per_s": 1000.0, "e2el_ms.mean": 50.0, "ttft_ms.p99": 600.0}
    score = measured_log_score(measured, [], objective="throughput", slo={}, num_gpus=2)
    assert score == pytest.approx(6.2146, abs=1e-3)
    slo = {"ttft_ms.p99": 500.0}
    late = measured_log_score(measured, [], objective="throughput", slo=slo, num_gpus=2)
    assert late == pytest.approx(score - 3 * 0.2)
    requests = [
        {
            "arrival_s": i / 10,
            "isl": 8,
            "osl": 11,
            "ttft_ms": 100.0 + 200 * (i % 2),
            "e2el_ms": 400.0,
        }
        for i in range(10)
    ]
    good = measured_log_score(
        measured, requests, objective="goodput", slo={"ttft_ms.p99": 200.0}, num_gpus=1
    )
    assert good < measured_log_score(measured, requests, objective="goodput", slo={}, num_gpus=1)
