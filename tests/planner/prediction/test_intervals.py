"""Intervals on a machine that no run has shown: wider, by what its host's speed would do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.calibration import Calibration, ErrorQuantiles, Provenance, interval_keys
from cost_models.profile_io import load_gpu
from engines.registry import load_calibration
from planner import api
from planner.prediction.intervals import Uncertainty, host_uncertainties, interval_90, load_regime
from planner.prediction.predict import predict_deployment

WORKLOAD = json.loads((Path(__file__).parents[3] / "profiles/workloads/chat.json").read_text())


@pytest.fixture
def lopsided() -> Calibration:
    found = {"tpot_ms.mean": ErrorQuantiles(log_q05=-0.01, log_q95=0.2)}
    shipped = load_calibration(load_gpu("h200"), "vllm")
    return replace(shipped, intervals=found, knows_host=True)


NO_DOUBT = Uncertainty()


def ends(calibration: Calibration, doubt: Uncertainty = NO_DOUBT) -> tuple[float, float]:
    low, high = interval_90("tpot_ms.mean", 1.0, calibration, Provenance.CALIBRATED, doubt=doubt)
    return math.log(low), math.log(high)


def test_residuals_lean_to_a_side_only_where_they_were_seen(lopsided: Calibration) -> None:
    assert ends(lopsided) == pytest.approx((-0.01, 0.2))
    assert ends(replace(lopsided, knows_host=False)) == pytest.approx((-0.2, 0.2))


def test_only_runs_of_ones_own_on_that_gpu_tell_its_host(tmp_path: Path) -> None:
    """Two hosts of an H200 differ, too; TensorRT-LLM's residuals were made between hosts."""
    gpu = load_gpu("h200")
    assert load_calibration(gpu, "vllm").borrows_host
    assert not load_calibration(gpu, "trtllm").borrows_host
    for taught, borrows in (("h200_sxm", False), ("h100_sxm", True)):
        own = tmp_path / f"{taught}.json"
        own.write_text(
            json.dumps({"schema_version": 1, "engine": "vllm", "data": {"gpus": [taught]}})
        )
        assert load_calibration(gpu, "vllm", own=[own]).borrows_host is borrows


@pytest.mark.parametrize(
    ("seen", "provenance"),
    [((), Provenance.DATASHEET), (("attention_prefill/fp8",), Provenance.CALIBRATED)],
)
def test_a_borrowed_operator_that_own_runs_have_used_is_calibrated(
    seen: tuple[str, ...], provenance: Provenance
) -> None:
    problem = api.load_problem(gpu="h200", workload="chat", engine="vllm")
    calibration = replace(
        problem.evaluator.calibration,
        borrowed=frozenset({"attention_prefill/fp8"}),
        seen_operators=frozenset(seen),
    )
    evaluator = replace(problem.evaluator, calibration=calibration)
    config = replace(problem.default_config, quantization="fp8_dynamic", kv_cache_dtype="fp8")
    assert evaluator.provenance_of(config) is provenance


def test_doubts_add_in_quadrature(lopsided: Calibration) -> None:
    low, high = ends(lopsided, Uncertainty(chance=0.1, below=0.3, above=0.4))
    assert low == pytest.approx(-math.sqrt(0.01**2 + (1.645 * 0.1) ** 2 + 0.3**2))
    assert high == pytest.approx(math.sqrt(0.2**2 + (1.645 * 0.1) ** 2 + 0.4**2))


def test_a_doubt_reaches_as_far_as_either_host_moves_the_value() -> None:
    found = host_uncertainties({"a": 1.0}, {"a": 0.8}, {"a": 2.0})["a"]
    assert (found.below, found.above) == pytest.approx((math.log(1 / 0.8), math.log(2)))
    one_sided = host_uncertainties({"a": 1.0}, {"a": 1.1}, {"a": 1.2})["a"]
    assert one_sided.below == 0


def test_a_slow_host_opens_more_near_capacity(tmp_path: Path) -> None:
    """An H100's host is borrowed under vLLM: a queue forms where little capacity is left."""

    def width(rate_per_s: float) -> float:
        arrival = {"process": "poisson", "rate_per_s": rate_per_s}
        path = tmp_path / "chat.json"
        path.write_text(json.dumps(WORKLOAD | {"arrival": arrival}))
        problem = api.load_problem(gpu="h100", engine="vllm", workload=str(path))
        found = predict_deployment(problem.evaluator, problem.default_deployment).metrics[
            "ttft_ms.mean"
        ]
        return math.log(found.interval_90[1] / found.value)

    assert width(20.0) > 1.5 * width(2.0)


def test_near_capacity_is_a_kind_of_load_of_open_loops() -> None:
    assert load_regime("open_loop", 0.9) == "open_loop_near_capacity"
    assert load_regime("open_loop", 0.5) == "open_loop"
    assert load_regime("closed_loop", 1.0) == "closed_loop"
    assert interval_keys("m", "open_loop_near_capacity") == (
        "open_loop_near_capacity/m", "open_loop/m", "m",
    )  # fmt: skip
    assert interval_keys("m", "closed_loop") == ("closed_loop/m", "m")


def test_no_more_is_served_than_comes() -> None:
    rate_per_s = WORKLOAD["arrival"]["rate_per_s"]
    found = api.predict(gpu="h200", workload="chat", engine="vllm")
    for name in ("request_per_s", "goodput_request_per_s"):
        low, high = found.metrics[name].interval_90
        assert low < found.value(name) <= high <= rate_per_s * 1.001
    # The cost of a token is least where all that comes is served.
    cost = found.metrics["usd_per_million_output_tokens"]
    served = rate_per_s / found.value("request_per_s")
    assert cost.interval_90[0] == pytest.approx(cost.value / served, rel=1e-3)


def test_clients_that_wait_for_answers_bring_as_many_as_are_served() -> None:
    found = api.predict(gpu="h200", workload="ladder").metrics["request_per_s"]
    assert found.interval_90[1] > 1.01 * found.value


@pytest.mark.parametrize("engine", ["trtllm", "vllm"])
def test_rates_of_one_run_are_off_by_the_same(engine: str) -> None:
    """Clients' requests, their tokens, and those of each GPU differ by constants."""
    calibration = load_calibration(load_gpu("h200"), engine)
    ends_of = {
        rate: interval_90(rate, 1.0, calibration, Provenance.CALIBRATED, regime="closed_loop")
        for rate in ("request_per_s", "output_tok_per_s", "output_tok_per_s_per_gpu")
    }
    assert len(set(ends_of.values())) == 1
    # Goodput hangs on who keeps the limits, too; it is wider than a rate, not unknown.
    low, _ = interval_90("goodput_request_per_s", 1.0, calibration, Provenance.CALIBRATED)
    assert math.exp(-1.5 * 0.25) < low < ends_of["request_per_s"][0]


def test_a_token_costs_most_where_the_rate_is_least(lopsided: Calibration) -> None:
    found = {"output_tok_per_s": ErrorQuantiles(log_q05=-0.2, log_q95=0.02)}
    calibration = replace(lopsided, intervals=found)
    low, high = interval_90(
        "usd_per_million_output_tokens", 1.0, calibration, Provenance.CALIBRATED
    )
    assert (math.log(low), math.log(high)) == pytest.approx((-1.5 * 0.02, 1.5 * 0.2))
