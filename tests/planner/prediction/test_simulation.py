"""Workloads, traces and runs as the simulator serves them, from the use cases' side."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.step import StepBatch
from planner.prediction.highest_rate import check_has_rate, highest_rate
from planner.prediction.predict import Prediction, predict_deployment
from planner.prediction.simulation import out_of_step
from planner.prediction.simulation_files import write_requests, write_timeline
from planner.question import Problem, load_problem, predict, predict_problem
from planner.simulator import Requests, offline_arrivals
from planner.validation.validate import validate
from planner.workloads.demand import Demand, workload_demand
from planner.workloads.load import ArrivalMode
from planner.workloads.workload import list_workloads, load_workload

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def chat() -> Problem:
    return load_problem(gpu="h100", workload="chat")


def _closed_loop(isl: int, osl: int, *, clients: int) -> Demand:
    count = 20 * clients
    return Demand(
        protocol=ArrivalMode.CLOSED_LOOP,
        requests=Requests.of(np.full(count, isl), np.full(count, osl)),
        arrival_s=offline_arrivals(count),
        concurrency=clients,
        is_endless=True,
    )


def test_only_arrivals_without_an_end_have_a_warm_up() -> None:
    """A workload that counts its requests asks for the first ones, too."""
    assert workload_demand(load_workload("chat")).has_steady_state
    counted = load_workload(str(ROOT / "docs/regret_h100/code_open.json"))
    demand = workload_demand(counted)
    assert not demand.has_steady_state
    assert len(demand) == counted.arrival.num_requests


@pytest.mark.parametrize(
    ("isl", "osl", "clients"), [(128, 1024, 8), (512, 512, 32), (64, 2048, 64)]
)
def test_agrees_with_the_closed_form_where_both_apply(
    tmp_path: Path, isl: int, osl: int, clients: int
) -> None:
    """Fixed lengths, closed loop, ample KV cache: TPOT and throughput within 3 %."""
    workload = {
        "schema_version": 1,
        "name": "fixed",
        "model": "llama-3.1-8b",
        "arrival": {"process": "closed_loop", "concurrency": clients},
        "isl": {"kind": "fixed", "tokens": float(isl)},
        "osl": {"kind": "fixed", "tokens": float(osl)},
    }
    path = tmp_path / "fixed.json"
    path.write_text(json.dumps(workload))
    problem = load_problem(gpu="h100", workload=str(path))
    config = replace(problem.default_config, cuda_graph_padding=True)
    closed = predict_deployment(problem.evaluator, problem.deployment_of(config))
    simulated = predict_deployment(
        problem.evaluator, problem.deployment_of(config), _closed_loop(isl, osl, clients=clients)
    )
    for metric in ("tpot_ms.mean", "output_tok_per_s"):
        assert simulated.value(metric) == pytest.approx(closed.value(metric), rel=0.03)


@pytest.mark.parametrize(
    ("model", "split"),
    [
        ("llama-3.3-70b", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("llama-3.3-70b", {"pipeline_parallel_size": 4}),
        ("deepseek-v3", {"tensor_parallel_size": 8, "enable_attention_dp": True}),
    ],
)
def test_lanes_in_step_cost_the_same_in_both_forms(
    tmp_path: Path, model: str, split: dict[str, Any]
) -> None:
    """A prompt on one instance holds up all, in the simulation and in the closed form."""
    workload = {
        "schema_version": 1,
        "name": "fixed",
        "model": model,
        "arrival": {"process": "closed_loop", "concurrency": 64, "num_requests": 640},
        "isl": {"kind": "fixed", "tokens": 1024.0},
        "osl": {"kind": "fixed", "tokens": 256.0},
    }
    path = tmp_path / "fixed.json"
    path.write_text(json.dumps(workload))
    problem = load_problem(gpu="h200", workload=str(path))
    config = replace(problem.default_config, max_batch_size=64, **split)
    closed = predict_deployment(problem.evaluator, problem.deployment_of(config))
    simulated = predict_deployment(
        problem.evaluator, problem.deployment_of(config), workload_demand(problem.workload)
    )
    for metric in ("tpot_ms.mean", "output_tok_per_s"):
        assert simulated.value(metric) == pytest.approx(closed.value(metric), rel=0.05)
    assert closed.value("itl_ms.p99") > 1.5 * closed.value("itl_ms.p50")


def test_experts_work_on_what_the_ranks_bring_on_average() -> None:
    problem = load_problem(gpu="h200", workload="chat", model="deepseek-v3")
    config = replace(problem.default_config, tensor_parallel_size=8, enable_attention_dp=True)
    step = problem.evaluator.step_model(config)
    prompt = StepBatch(prefill_sequences=1.0, prefill_tokens=2048.0)
    unsaid, equal, alone = (
        step.cost(replace(prompt, rank_tokens=tokens)).by_family
        for tokens in (np.nan, 2048.0, 256.0)
    )
    changed = {f for f in equal if f != "launch" and alone[f] < equal[f]}
    assert changed == {"moe", "communication"}
    assert all(equal[family] == unsaid[family] for family in equal)
    assert all(alone[f] == equal[f] for f in equal.keys() - changed - {"launch"})


@pytest.mark.parametrize("workload", list_workloads())
def test_every_shipped_workload_is_answered_with_percentiles(workload: str) -> None:
    prediction = predict(gpu="h200", workload=workload, settings={"enable_chunked_prefill": "true"})
    summary = prediction.to_json()["simulation"]
    assert summary["num_requests"] >= 2000
    assert summary["num_refused"] == 0
    latencies = [prediction.value(f"ttft_ms.{p}") for p in ("p50", "p90", "p95", "p99")]
    assert latencies == sorted(latencies)


@pytest.mark.parametrize(
    "trace", ["azure2023_AzureLLMInferenceTrace_conv.csv", "mooncake_conversation_trace.jsonl"]
)
def test_public_traces_are_served_whole(shared: Path, trace: str) -> None:
    prediction = predict(
        gpu="h200",
        workload=str(shared / "traces" / trace),
        model="llama-3.1-8b",
        settings={"enable_chunked_prefill": "true", "kv_cache_dtype": "fp8"},
    )
    result = prediction.simulation
    assert result is not None
    assert result.num_requests == len(load_workload(str(shared / "traces" / trace)).trace.isl)  # type: ignore[union-attr]
    assert np.isfinite(prediction.value("e2el_ms.p99"))
    if trace.endswith("jsonl"):
        assert result.prefix_hit_fraction > 0.05


def test_a_trace_named_by_a_workload_file_brings_arrivals_and_lengths(tmp_path: Path) -> None:
    rows = [{"timestamp": 500 * i, "input_length": 100 + i, "output_length": 20} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "w.json"
    file.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "name": "traced",
                "model": "llama-3.1-8b",
                "arrival": {"process": "trace", "file": "t.jsonl"},
                "slo": {"ttft_ms.p99": 500.0},
            }
        )
    )
    demand = workload_demand(load_workload(str(file)))
    assert demand.requests.isl.tolist() == [100 + i for i in range(40)]
    assert demand.arrival_s == pytest.approx(np.arange(40) / 2)
    prediction = predict(gpu="h100", workload=str(file))
    assert prediction.simulation is not None
    assert prediction.simulation.num_requests == 40
    assert prediction.meets_slo


def test_prompts_that_the_engine_refuses_are_counted(chat: Problem) -> None:
    config = replace(chat.default_config, max_batch_size=64, max_num_tokens=2048)
    prediction = predict_deployment(
        chat.evaluator, chat.deployment_of(config), workload_demand(chat.workload)
    )
    summary = prediction.to_json()["simulation"]
    expected = (workload_demand(chat.workload).requests.isl > 2048).sum()
    assert summary["num_refused"] == expected > 0
    assert not prediction.feasible
    assert "max_num_tokens refuses" in prediction.binding_limit
    (refused,) = prediction.refusals
    assert refused.share == expected / summary["num_requests"]
    accepted = replace(config, max_num_tokens=refused.accepted_from)
    taken = predict_deployment(
        chat.evaluator, chat.deployment_of(accepted), workload_demand(chat.workload)
    )
    assert not taken.refusals


def test_a_shared_prefix_is_computed_once() -> None:
    with_reuse, without = (
        predict(
            gpu="h100",
            workload="agent",
            settings={"enable_chunked_prefill": "true", "enable_block_reuse": reuse},
        )
        for reuse in ("true", "false")
    )
    assert with_reuse.simulation is not None
    assert without.simulation is not None
    assert with_reuse.simulation.prefix_hit_fraction > 0.15
    assert without.simulation.prefix_hit_fraction == 0
    assert with_reuse.value("ttft_ms.p50") < without.value("ttft_ms.p50")


@pytest.mark.parametrize("num_servers", [2, 4])
def test_servers_share_the_requests(chat: Problem, num_servers: int) -> None:
    demand = workload_demand(chat.workload).at_rate(24.0)
    config = replace(chat.default_config, enable_chunked_prefill=True)
    one = predict_deployment(chat.evaluator, chat.deployment_of(config), demand)
    several = predict_deployment(
        chat.evaluator, chat.deployment_of(config, num_servers=num_servers), demand
    )
    assert several.simulation is not None
    assert len(several.simulation.engines) == num_servers
    assert several.simulation.num_requests == len(demand)
    assert several.value("tpot_ms.mean") < one.value("tpot_ms.mean")


def test_out_of_step_only_shortens_first_outputs() -> None:
    requests = Requests.of(np.full(40, 100), np.full(40, 200))
    drifted = out_of_step(requests, 16)
    assert (drifted.osl[16:] == 200).all()
    assert (drifted.osl[:16] <= 200).all()
    assert len(set(drifted.osl[:16].tolist())) > 12


def _rate_limited(chat: Problem) -> tuple[Problem, EngineConfig]:
    config = replace(chat.default_config, enable_chunked_prefill=True, max_batch_size=64)
    return chat, config


def test_find_rate_brackets_the_slo(chat: Problem) -> None:
    problem, config = _rate_limited(chat)
    demand = workload_demand(problem.workload)
    deployment = problem.deployment_of(config)
    found = highest_rate(problem.evaluator, deployment, demand)
    at, above = (
        predict_deployment(problem.evaluator.at_rate(rate), deployment, demand.at_rate(rate))
        for rate in (found.rate_per_s, found.rate_per_s * 1.05)
    )
    assert at.feasible
    assert not above.feasible
    assert found.rate_per_s > 8
    assert found.num_simulations <= 8


def test_a_highest_rate_needs_arrivals() -> None:
    offline = load_problem(gpu="h100", workload="offline-batch")
    with pytest.raises(ConfigError, match="own clock"):
        check_has_rate(workload_demand(offline.workload).protocol)


@pytest.fixture(scope="module")
def served(chat: Problem) -> Prediction:
    config = replace(chat.default_config, enable_chunked_prefill=True)
    return predict_deployment(
        chat.evaluator, chat.deployment_of(config), workload_demand(chat.workload)
    )


def test_written_requests_say_what_the_metrics_say(served: Prediction, tmp_path: Path) -> None:
    assert served.simulation is not None
    write_requests(served.simulation, tmp_path / "r.jsonl", with_itl=True)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    counted = rows[served.simulation.warm_up_requests :]
    assert len(rows) == served.simulation.num_requests
    p99 = np.quantile([row["ttft_ms"] for row in counted], 0.99)
    assert p99 == pytest.approx(served.value("ttft_ms.p99"), rel=1e-3)
    for row in rows[:50]:
        assert len(row["itl_ms"]) == row["osl"] - 1
        assert row["ttft_ms"] + sum(row["itl_ms"]) == pytest.approx(row["e2el_ms"], rel=0.02)


def test_an_order_that_the_engine_lacks_is_compared_and_marked(chat: Problem) -> None:
    config = replace(chat.default_config, enable_chunked_prefill=True, max_batch_size=32)
    demand = workload_demand(chat.workload).at_rate(30.0)
    fair, short = (
        predict_problem(chat, chat.deployment_of(config), {"queue_order": order}, demand=demand)
        for order in ("FIRST_COME_FIRST_SERVED", "SHORTEST_JOB_FIRST")
    )
    assert not fair[1]
    assert [violation.knob for violation in short[1]] == ["queue_order"]
    assert short[0].value("e2el_ms.mean") < 0.8 * fair[0].value("e2el_ms.mean")
    assert short[0].value("e2el_ms.p99") > 1.1 * fair[0].value("e2el_ms.p99")


def test_time_by_operator_adds_up_to_the_time_that_the_engine_worked(served: Prediction) -> None:
    assert served.simulation is not None
    log = served.simulation.engines[0].log
    busy_s = float((log.end_s - log.start_s).sum())
    assert sum(served.time_by_operator.values()) == pytest.approx(busy_s, rel=0.1)
    assert served.time_by_operator["gemm"] > 0.3 * busy_s


def test_the_timeline_is_a_trace_of_every_step(served: Prediction, tmp_path: Path) -> None:
    assert served.simulation is not None
    write_timeline(served.simulation, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert sum(event["args"]["steps"] for event in steps) == served.simulation.num_steps
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.2 for a, b in itertools.pairwise(steps))
    used = [e["args"]["used"] for e in events if e["name"] == "KV cache used %"]
    assert 0 < max(used) <= 100
    wasted = [e["args"]["wasted"] for e in events if e["name"] == "KV cache wasted %"]
    # Every sequence leaves part of its last block empty, never more than one block.
    assert 0 < max(wasted) < max(used)


def test_measured_arrivals_enter_open_loops_only(tmp_path: Path) -> None:
    """In a closed loop arrivals are the engine's own answer."""
    predicted = []
    for scale in (1.0, 3.0):
        rows = [
            {"arrival_s": scale * i, "isl": 100 + i % 7, "osl": 30, "ttft_ms": 1, "e2el_ms": 2}
            for i in range(60)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        run = {
            "run_id": "closed",
            "gpu": "h200_sxm",
            "engine": "vllm",
            "model": "llama-3.1-8b",
            "config": {"quantization": "bf16", "kv_cache_dtype": "bf16"},
            "workload": {
                "protocol": "closed_loop",
                "concurrency": 8,
                "num_requests": 60,
                "requests_file": "r.jsonl.gz",
            },
            "measured": {"tpot_ms": {"mean": 1.0}},
        }
        folder = tmp_path / str(scale)
        folder.mkdir()
        (folder / "r.jsonl.gz").write_bytes((tmp_path / "r.jsonl.gz").read_bytes())
        (folder / "runs.jsonl").write_text(json.dumps(run) + "\n")
        predicted.append(validate(folder / "runs.jsonl").rows[0].predicted)
    assert predicted[0] == predicted[1]
