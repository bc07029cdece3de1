"""What a precision is expected to lose, and what a plan makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models.errors import PlannerError
from cost_models.profile_io import load_model
from engines.registry import find_engine, list_engines
from planner.plans.make import plan
from planner.quality import QUALITY_LOSS, QualityLoss, QualityTable, Source
from planner.quality.files import install, load_quality, own_file
from planner.quality.table import Observation, pooled
from planner.question import PlanRequest, changed_load, load_problem
from planner.search.objective import quality_handicap


def report(quantization: str, kv_cache_dtype: str, loss_pct: float) -> dict[str, Any]:
    interval = [loss_pct - 0.1, loss_pct + 0.1]
    estimate = {"value": loss_pct, "interval_90": interval}
    return {
        "model": "folder",
        "precision": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "num_tokens": 1000,
        "estimates": {"perplexity_loss_pct": estimate},
    }


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_every_precision_of_every_engine_has_a_published_loss() -> None:
    table = load_quality(load_model("llama-3.1-8b"))
    for engine in list_engines():
        rules = find_engine(engine).rules
        for name in set(rules.quantizations) - {"bf16", "fp16", "w4a16_mxfp4"}:
            loss = table.loss(name, "bf16")
            assert loss.provenance is Source.PUBLISHED, name
            assert loss.sources
        for name in set(rules.kv_cache_dtypes) - {"bf16", "fp16"}:
            assert table.loss("bf16", name).provenance is Source.PUBLISHED, name


def test_the_published_checkpoint_loses_nothing() -> None:
    for model, native in (("llama-3.1-8b", "bf16"), ("deepseek-r1", "fp8_block")):
        loss = load_quality(load_model(model)).loss(native, "bf16")
        assert (loss.loss_pct, loss.spread_pct, loss.provenance) == (0.0, 0.0, Source.EXACT)


def test_large_models_lose_less() -> None:
    """ModelOpt's benchmark.md: AWQ costs Llama-3.1-8B 5.66 % of MMLU, Llama-3.1-70B 1.07 %."""
    small, large = (
        load_quality(load_model(name)).loss("w4a16_awq", "bf16").loss_pct
        for name in ("llama-3.1-8b", "llama-3.1-70b")
    )
    assert 2.0 < small < 5.66
    assert 1.0 < large < 2.0


def test_pooling_weighs_by_nearness_and_keeps_the_spread() -> None:
    def seen(parameters: float, loss_pct: float) -> Observation:
        return Observation(
            model="m", parameters=parameters, loss_pct=loss_pct, metric="MMLU", source="s"
        )

    both = [seen(8e9, 4.0), seen(64e9, 1.0)]
    # Three doublings away weighs a tenth: (4 + 1 / 10) / 1.1.
    assert pooled(both, 8e9).loss_pct == pytest.approx(4.1 / 1.1)
    alike = pooled([seen(8e9, 2.0)] * 5, 8e9)
    assert alike.loss_pct == 2.0
    assert alike.spread_pct == pytest.approx(0.3)
    assert pooled(both, 23e9).spread_pct > 1


def test_losses_add_up_and_errors_in_quadrature() -> None:
    weights = QualityLoss(loss_pct=1.0, spread_pct=0.3, provenance=Source.MEASURED, sources=("a",))
    kv = QualityLoss(loss_pct=0.5, spread_pct=0.4, provenance=Source.PUBLISHED, sources=("b",))
    both = weights + kv
    assert (both.loss_pct, both.spread_pct) == pytest.approx((1.5, 0.5))
    assert (both.provenance, both.sources) == (Source.PUBLISHED, ("a", "b"))
    assert weights + QualityLoss() == weights


def test_a_limit_is_checked_at_the_risk_that_is_taken() -> None:
    loss = QualityLoss(loss_pct=1.0, spread_pct=0.5)
    assert loss.excess(2.0, 0.0) == pytest.approx(-0.5)
    assert loss.at_risk(0.1) == pytest.approx(1.0 + 1.645 * 0.5, abs=1e-3)
    assert loss.excess(0.0, 0.0) > 0
    assert QualityLoss().excess(0.0, 0.1) <= 0


def test_what_was_measured_stands_before_what_is_published(own_folder: None) -> None:
    del own_folder
    model = load_model("llama-3.1-8b")
    install(report("fp8", "bf16", 3.0), model)
    install(report("fp8", "fp8", 3.5), model)
    path = install(report("fp8", "bf16", 0.2), model)
    assert path == own_file(model)
    assert len(json.loads(path.read_text())["measured"]) == 2
    table = load_quality(model)
    assert table.loss("fp8", "bf16").loss_pct == 0.2
    assert table.loss("fp8", "bf16").provenance is Source.MEASURED
    assert table.loss("fp8", "fp8").loss_pct == 3.5
    assert table.loss("w4a16_awq", "bf16").provenance is Source.PUBLISHED
    assert load_quality(model, "shipped").loss("fp8", "bf16").provenance is Source.PUBLISHED
    assert load_quality(load_model("llama-3.1-70b")).loss("fp8", "bf16").loss_pct != 0.2


def test_a_report_that_names_no_precision_is_refused(own_folder: None) -> None:
    del own_folder
    with pytest.raises(PlannerError, match="does not say which quantization"):
        install(report("", "bf16", 1.0), load_model("llama-3.1-8b"))
    model = load_model("llama-3.1-8b")
    own_file(model).parent.mkdir(parents=True)
    own_file(model).write_text("{}")
    with pytest.raises(PlannerError, match="damaged"):
        load_quality(model)


def test_near_lossless_is_cheap_and_four_bits_are_dear() -> None:
    table = load_quality(load_model("llama-3.1-8b"))
    handicap = {
        name: quality_handicap(table.loss(name, "bf16"))
        for name in ("bf16", "fp8", "w4a16_awq", "w4a8_awq", "nvfp4", "int4_wo")
    }
    assert handicap["bf16"] == 0
    assert 0 < handicap["fp8"] < 0.06
    assert all(handicap[name] > 0.08 for name in ("w4a16_awq", "w4a8_awq", "nvfp4", "int4_wo"))


def test_a_limit_on_the_loss_is_a_constraint_of_the_plan() -> None:
    free = plan(PlanRequest(gpu="h100", workload="chat", trials=0))
    assert free.recommended.config.quantization == "fp8"
    strict = plan(PlanRequest(gpu="h100", workload="chat", trials=0, max_quality_loss_pct=0.0))
    assert strict.status == "feasible"
    config = strict.recommended.config
    assert (config.quantization, config.kv_cache_dtype) == ("bf16", "bf16")
    assert all(point.quality.loss_pct == 0 for point in strict.search.pareto)
    told = free.to_json()["recommended"]["quality"]
    low, high = told["interval_90"]
    assert low < told["loss_pct"] < high
    assert told["sources"]


def test_an_impossible_limit_is_an_answer() -> None:
    request = PlanRequest(
        gpu="h100",
        workload="chat",
        trials=0,
        pins={"quantization": "w4a16_awq"},
        max_quality_loss_pct=0.5,
    )
    found = plan(request)
    assert found.status == "infeasible"
    assert found.binding_limit == f"SLO {QUALITY_LOSS}"
    needed = next(one for one in found.relaxations if one.limit == QUALITY_LOSS)
    assert needed.given == 0.5
    assert needed.needed == pytest.approx(found.recommended.quality.loss_pct)


def test_what_if_keeps_losses_and_their_limit() -> None:
    problem = load_problem(gpu="h100", workload="chat", max_quality_loss_pct=1.0)
    changed = changed_load(problem, rate_per_s=3.0)
    assert changed.evaluator.quality == problem.evaluator.quality != QualityTable()
    assert changed.evaluator.max_quality_loss_pct == 1.0
