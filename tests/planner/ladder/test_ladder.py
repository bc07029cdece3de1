"""The ladder: predicted everywhere, measured where the engine is, stopped at the limit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from cost_models.errors import ConfigError
from planner.ladder.bench import Bench
from planner.ladder.ladder import Ladder, Origin, Step, ladder
from planner.ladder.request import LadderRequest
from planner.ladder.rungs import Rung
from tests.executor.conftest import stand_ins

__all__ = ["stand_ins"]

DATA = Path(__file__).parents[2] / "data"


@cache
def climbed(model: str = "tinyllama-1.1b", gpu: str = "h100", **options: float) -> Ladder:
    return ladder(LadderRequest(gpu=gpu, model=model, **options))  # type: ignore[arg-type]


def steps(found: Ladder) -> dict[str, Step]:
    return {step.rung.name: step for step in found.steps}


def test_every_step_of_the_default_stands_beside_the_others() -> None:
    found = climbed()
    by_name = steps(found)
    assert list(by_name) == ["baseline", "bf16", "fp8", "int8", "int4", "kv"]
    # 1.1 billion parameters of two bytes; embedding and head stay at two in FP8.
    assert by_name["bf16"].value("weight_bytes_per_gpu") == pytest.approx(
        2 * 1_100_048_384, rel=1e-4
    )
    embeddings = 2 * 32_000 * 2_048
    in_fp8 = 1_100_048_384 + embeddings
    assert by_name["fp8"].value("weight_bytes_per_gpu") == pytest.approx(in_fp8, rel=0.01)
    assert all(f.origin is Origin.PREDICTED for s in found.steps for f in s.figures.values())


def test_each_optimisation_is_no_slower_than_what_it_starts_from() -> None:
    by_name = steps(climbed())
    times = [by_name[name].value("e2el_ms.mean") for name in ("baseline", "bf16", "fp8", "kv")]
    assert times == sorted(times, reverse=True)
    ratio = by_name["kv"].value("kv_cache_tokens") / by_name["fp8"].value("kv_cache_tokens")
    assert ratio == pytest.approx(2.0, rel=0.01)


def test_what_the_engine_does_not_load_is_shown_and_not_recommended() -> None:
    int8 = steps(climbed())["int8"]
    assert not int8.is_usable
    assert "only the legacy TensorRT engine backend" in int8.notes[0]
    assert climbed().best is steps(climbed())["kv"]


def test_the_limit_ends_the_weights_and_not_the_cache() -> None:
    found = climbed("llama-3.1-8b", max_quality_loss_pct=1.2)
    by_name = steps(found)
    losses = {name: step.loss for name, step in by_name.items()}
    assert losses["bf16"] is not None
    assert losses["bf16"].loss_pct == 0.0
    over = next(step for step in found.steps if step.over_limit)
    assert over.loss is not None
    assert over.loss.loss_pct > 1.2
    assert found.steps[-1].rung.name == "kv"
    assert found.steps.index(over) == len(found.steps) - 2
    assert over.rung.title in found.stopped_because


def test_a_model_that_does_not_fit_goes_on_where_it_does() -> None:
    by_name = steps(climbed("llama-3.1-70b", gpu="a100"))
    assert "does not fit" in by_name["bf16"].notes[0]
    assert by_name["fp8"].figures == {}
    assert "cannot run it" in by_name["fp8"].notes[0]
    assert by_name["kv"].config.quantization == "w4a16_awq"
    assert by_name["kv"].is_usable


@pytest.mark.usefixtures("stand_ins")
def test_a_step_whose_engine_is_here_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("planner.ladder.bench.local_gpu", lambda: "h100_sxm")
    monkeypatch.chdir(tmp_path)
    here = Bench.can_run

    def only_bf16(bench: Bench, rung: Rung) -> bool:
        return rung.name == "bf16" and here(bench, rung)

    monkeypatch.setattr(Bench, "can_run", only_bf16)
    found = ladder(
        LadderRequest(
            gpu="h100",
            model="tinyllama-1.1b",
            workload=str(DATA / "few.json"),
            backend="vllm",
            store=f"sqlite:///{tmp_path}/runs.db",
            time_budget_s=10.0,
        )
    )
    by_name = steps(found)
    figures = by_name["bf16"].figures
    assert figures["tpot_ms.mean"].origin is Origin.MEASURED
    # The stand-in says so in its log, whatever it is given.
    assert figures["kv_cache_tokens"].value == 896_912
    assert by_name["baseline"].figures["tpot_ms.mean"].origin is Origin.PREDICTED


def test_text_without_weights_is_one_line() -> None:
    with pytest.raises(ConfigError, match="need a checkpoint with weights"):
        ladder(LadderRequest(gpu="h100", model="tinyllama-1.1b", data="x.jsonl"))
