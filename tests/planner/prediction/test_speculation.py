"""Speculation from the use cases' side: closed form and simulation, files, runs, plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.acceptance import Acceptance
from cost_models.engine import EngineConfig
from cost_models.profile_io import load_gpu
from engines.registry import load_calibration
from planner.calibration.text import text_rates
from planner.plans.make import plan
from planner.prediction.evaluator import Evaluator
from planner.question import (
    PlanRequest,
    Problem,
    load_problem,
    predict,
    predict_problem,
    search_space,
)
from planner.validation.validate import predict_run
from planner.what_if import legal_values
from planner.workloads.demand import workload_demand
from planner.workloads.measured import MeasuredRun, read_runs
from planner.workloads.workload import load_workload

RATES = {
    "NGram": {"acceptance": [0.8, 0.7, 0.6], "draft_rate": 0.9},
    "DraftTarget": {"acceptance": 0.75},
    "Eagle": {"acceptance": 0.75},
}

DRAFTING: dict[str, dict[str, str]] = {
    "NGram": {"decoding_type": "NGram", "max_draft_len": "3"},
    "DraftTarget": {
        "decoding_type": "DraftTarget", "max_draft_len": "3", "speculative_model": "llama-3.2-1b",
    },
    "Eagle": {"decoding_type": "Eagle", "max_draft_len": "4", "speculative_model": "eagle3"},
}  # fmt: skip


def workload_file(folder: Path, *, clients: int, osl: int = 400, **changes: Any) -> Path:
    content = {
        "schema_version": 1,
        "name": "drafted",
        "model": "llama-3.1-8b",
        "arrival": {"process": "closed_loop", "concurrency": clients, "num_requests": 12 * clients},
        "isl": 200,
        "osl": osl,
        "speculation": RATES,
        "objective": "throughput",
    } | changes
    path = folder / f"drafted-{clients}.json"
    path.write_text(json.dumps(content))
    return path


def problem_of(path: Path, engine: str = "vllm") -> Problem:
    return load_problem(gpu="h200", workload=str(path), engine=engine)


@pytest.mark.parametrize(
    ("kind", "engine", "clients"),
    [("NGram", "vllm", 4), ("DraftTarget", "vllm", 8), ("Eagle", "trtllm", 8)],
)
def test_simulation_agrees_with_the_closed_form(
    tmp_path: Path, kind: str, engine: str, clients: int
) -> None:
    problem = problem_of(workload_file(tmp_path, clients=clients), engine)
    demand = workload_demand(problem.workload)
    config = problem.default_config
    simulated, _ = predict_problem(
        problem, problem.deployment_of(config), DRAFTING[kind], demand=demand
    )
    averaged, _ = predict_problem(problem, problem.deployment_of(config), DRAFTING[kind])
    assert simulated.value("tpot_ms.mean") == pytest.approx(
        averaged.value("tpot_ms.mean"), rel=0.03
    )
    assert simulated.simulation is not None
    # What was asked is what came out, whatever the drafts did.
    assert (simulated.simulation.requests.osl == 400).all()
    usage = simulated.simulation.kv_usage()
    assert 0 < usage.max_fraction <= 1


def test_requests_differ_by_their_luck_with_drafts(tmp_path: Path) -> None:
    problem = problem_of(workload_file(tmp_path, clients=4))
    demand = workload_demand(problem.workload)
    drafted, _ = predict_problem(
        problem, problem.default_deployment, DRAFTING["NGram"], demand=demand
    )
    plain, _ = predict_problem(problem, problem.default_deployment, {}, demand=demand)

    def spread(prediction: Any) -> float:
        return float(prediction.value("tpot_ms.p99") / prediction.value("tpot_ms.p50"))

    assert spread(drafted) > spread(plain) + 0.03
    # A client gets several tokens at a time: gaps are those of iterations.
    tokens = drafted.speculation.tokens_per_step if drafted.speculation else 0.0
    gap = drafted.value("itl_ms.p50") / drafted.value("tpot_ms.p50")
    assert gap == pytest.approx(tokens, rel=0.08)


def test_iterations_are_counted_not_tokens(tmp_path: Path) -> None:
    sure = {"NGram": {"acceptance": 1.0}}
    problem = problem_of(workload_file(tmp_path, clients=1, osl=41, speculation=sure))
    demand = workload_demand(problem.workload)
    found, _ = predict_problem(
        problem, problem.default_deployment, DRAFTING["NGram"], demand=demand
    )
    assert found.simulation is not None
    # Four tokens an iteration, and one that prefills, for each of twelve requests.
    assert found.simulation.num_steps == 12 * (1 + 40 // 4)


def test_without_a_draft_nothing_changes(tmp_path: Path) -> None:
    problem = problem_of(workload_file(tmp_path, clients=4, osl=40))
    demand = workload_demand(problem.workload)
    off = {"decoding_type": "NGram", "max_draft_len": "0"}
    drafted, _ = predict_problem(problem, problem.default_deployment, off, demand=demand)
    plain, _ = predict_problem(problem, problem.default_deployment, {}, demand=demand)
    assert {k: m.value for k, m in drafted.metrics.items()} == {
        k: m.value for k, m in plain.metrics.items()
    }
    assert drafted.speculation is None


def test_better_drafts_are_never_slower(tmp_path: Path) -> None:
    times = []
    for chance in (0.0, 0.5, 0.9):
        path = workload_file(
            tmp_path, clients=4, osl=100, speculation={"NGram": {"acceptance": chance}}
        )
        found = predict(gpu="h200", workload=str(path), engine="vllm", settings=DRAFTING["NGram"])
        times.append(found.value("tpot_ms.mean"))
    assert times == sorted(times, reverse=True)


def test_a_prior_widens_the_interval_and_says_so(tmp_path: Path) -> None:
    known = workload_file(tmp_path, clients=4, osl=40)
    told = predict(gpu="h200", workload=str(known), settings=DRAFTING["Eagle"])
    unknown = workload_file(tmp_path, clients=5, osl=40, speculation={})
    guessed = predict(gpu="h200", workload=str(unknown), settings=DRAFTING["Eagle"])

    def width(prediction: Any) -> float:
        low, high = prediction.metrics["tpot_ms.mean"].interval_90
        return float(np.log(high / low))

    assert width(guessed) > width(told)
    assert guessed.to_json()["speculation"]["is_prior"] is True
    assert "EAGLE-3" in guessed.to_json()["speculation"]["source"]
    assert told.to_json()["speculation"]["source"] == "stated by workload drafted"


def measured_run(tmp_path: Path, notes: str = "") -> MeasuredRun:
    """Ten requests of 101 tokens: 500 steps, drafts in 400 of them."""
    line = {
        "run_id": "r", "gpu": "h200", "engine": "vllm", "engine_version": "0.25.1",
        "model": "meta-llama/Llama-3.1-8B-Instruct", "notes": notes,
        "config": {"decoding_type": "NGram", "max_draft_len": 2, "max_matching_ngram_size": 2},
        "workload": {
            "protocol": "closed_loop", "concurrency": 2, "num_requests": 10, "isl": 64, "osl": 101,
        },
        "measured": {
            "tpot_ms": {"mean": 3.0}, "num_drafts": 400, "num_draft_tokens": 800,
            "num_accepted_draft_tokens": 500, "num_accepted_draft_tokens_at.0": 300,
            "num_accepted_draft_tokens_at.1": 200, "num_prefix_cache_hit_tokens": 160,
        },
    }  # fmt: skip
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    run, _, _ = next(read_runs(path))
    assert run is not None
    return run


def test_a_run_is_predicted_with_the_acceptance_that_it_met(tmp_path: Path) -> None:
    run = measured_run(tmp_path)
    acceptance = run.load().acceptances["NGram"]
    assert acceptance.conditional == pytest.approx((0.75, 2 / 3))
    assert acceptance.draft_rate == pytest.approx(0.8)
    assert acceptance.tokens_per_step(2) == pytest.approx(1000 / 500)
    unlucky = replace(
        run,
        measured={
            **run.measured, "num_accepted_draft_tokens": 100,
            "num_accepted_draft_tokens_at.0": 80, "num_accepted_draft_tokens_at.1": 20,
        },
    )  # fmt: skip
    lucky_ms, unlucky_ms = (predict_run(r).predicted["tpot_ms.mean"] for r in (run, unlucky))
    assert unlucky_ms > 1.3 * lucky_ms


def test_calibration_keeps_what_text_told_and_nothing_else(tmp_path: Path) -> None:
    rates = text_rates([measured_run(tmp_path)])
    assert rates.prefix_hits == {"llama-3.1-8b": pytest.approx(0.25)}
    key = "llama-3.1-8b/NGram"
    assert rates.acceptances[key].draft_rate == pytest.approx(0.8)
    assert any(key in line for line in rates.lines())
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"schema_version": 1, **rates.to_json()}))
    gpu = load_gpu("h200")
    calibration = load_calibration(gpu, "vllm", [own])
    known = problem_of(workload_file(tmp_path, clients=1, speculation={})).evaluator
    seen = replace(known.under(known.load), calibration=calibration)
    config = EngineConfig(decoding_type="NGram", max_draft_len=2)
    assert seen.tokens_per_step(config) == pytest.approx(2.0)
    assert known.tokens_per_step(config) != pytest.approx(2.0)
    for notes in ("random weights", "synthetic acceptance"):
        assert not text_rates([measured_run(tmp_path, notes)]).acceptances


def small_plan(path: Path) -> Any:
    return plan(
        PlanRequest(
            gpu="h200",
            workload=str(path),
            engine="vllm",
            trials=1,
            pins={"quantization": "bf16", "kv_cache_dtype": "bf16", "max_num_tokens": "8192"},
        )
    )


def test_a_plan_drafts_where_it_pays_and_not_where_it_loses(tmp_path: Path) -> None:
    sure = {"NGram": {"acceptance": 0.8}}
    alone = small_plan(workload_file(tmp_path, clients=1, osl=100, speculation=sure))
    assert alone.recommended.config.decoding_type == "NGram"
    assert [n.value for n in alone.neighbours if n.knob == "decoding_type"] == [
        "DraftTarget",
        "off",
    ]
    poor = {"NGram": {"acceptance": 0.3}, "DraftTarget": {"acceptance": 0.7}}
    crowd = small_plan(workload_file(tmp_path, clients=128, osl=100, speculation=poor))
    assert not crowd.recommended.config.speculates
    words = {n.value: n.verdict for n in crowd.neighbours if n.knob == "decoding_type"}
    assert set(words) == {"NGram", "DraftTarget"}
    assert "% TPOT at max_draft_len=" in words["DraftTarget"]
    assert "known" in words["NGram"]


def test_a_prior_must_win_beyond_its_doubt(tmp_path: Path) -> None:
    """A gain that is gone at the low end of the interval is not one to deploy."""
    path = workload_file(tmp_path, clients=48, osl=100, speculation={})
    found = small_plan(path)
    assert not found.recommended.config.speculates
    evaluator: Evaluator = problem_of(path).evaluator
    config = EngineConfig(decoding_type="NGram", max_draft_len=3)
    assert evaluator.acceptance_log_error(config) > 0.1
    known = {"NGram": Acceptance(conditional=(0.5,))}
    stated = evaluator.under(replace(evaluator.load, acceptances=known))
    assert stated.acceptance_log_error(config) == 0


def test_a_pinned_way_to_draft_is_completed(tmp_path: Path) -> None:
    problem = problem_of(workload_file(tmp_path, clients=1))

    def base(**pins: str) -> EngineConfig:
        request = PlanRequest(gpu="h200", workload="w", engine="vllm", pins=pins)
        return search_space(problem, request).base.config

    found = base(decoding_type="DraftTarget")
    assert found.speculative_model == "meta-llama/Llama-3.2-1B-Instruct"
    assert found.max_draft_len == 3
    assert base(decoding_type="NGram", max_draft_len="5").max_draft_len == 5
    assert not base().speculates


def test_what_if_offers_what_the_engine_offers(tmp_path: Path) -> None:
    problem = problem_of(workload_file(tmp_path, clients=1), "trtllm")
    deployment = problem.default_deployment

    def offered(knob: str) -> tuple[Any, ...]:
        return legal_values(problem, deployment, knob, num_gpus=1)

    assert offered("decoding_type") == ("", "NGram", "DraftTarget", "Eagle", "MTP")
    assert offered("max_draft_len")[:3] == (0, 1, 2)
    assert offered("speculative_model") == ("", "meta-llama/Llama-3.2-1B-Instruct")


def test_a_workload_states_its_rates(tmp_path: Path) -> None:
    found = load_workload(str(workload_file(tmp_path, clients=1))).load().acceptances
    assert found["NGram"].conditional == (0.8, 0.7, 0.6)
    assert found["NGram"].draft_rate == 0.9
    assert found["Eagle"].conditional == (0.75,)
    assert not found["Eagle"].is_prior
