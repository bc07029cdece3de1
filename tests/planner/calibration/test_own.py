"""A user's own calibration: put in force, used everywhere, compared, set aside."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from cost_models.calibration_io import engine_constants_to_json
from cost_models.errors import ConfigError, ProfileError
from cost_models.gpu import GpuSpec
from cost_models.profile_io import load_gpu
from engines.registry import load_calibration
from planner import api
from planner.calibration.diff import compare
from planner.cli.main import planner
from planner.measuring.measure import list_runs
from planner.own_calibrations import (
    constants_name,
    files_in_force,
    own_folder,
    put_in_force,
    set_aside,
)

ROOT = Path(__file__).parents[3]
MICROBENCH = ROOT / "profiles" / "microbench" / "h200_sxm"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def slower(gpu: GpuSpec, path: Path, factor: float = 3.0) -> Path:
    """A calibration file that differs in one constant."""
    content = engine_constants_to_json(load_calibration(gpu))
    content["step"]["host_s"] *= factor
    path.write_text(json.dumps(content))
    return path


def tpot_ms(calibration: str = "") -> float:
    found = api.predict(gpu="h100", workload="chat", calibration=calibration)
    return found.value("tpot_ms.mean")


def test_own_constants_are_in_force_until_set_aside(tmp_path: Path, h100: GpuSpec) -> None:
    before = tpot_ms()
    path = put_in_force(slower(h100, tmp_path / "candidate.json"), name="trtllm")
    assert path == own_folder() / "trtllm.json"
    assert not (tmp_path / "candidate.json").exists()
    assert tpot_ms() > 1.02 * before
    assert tpot_ms(calibration="shipped") == before
    assert [aside.name for aside in set_aside()] == ["trtllm.json.old"]
    assert tpot_ms() == before


def test_a_file_takes_the_place_of_the_users_own(tmp_path: Path, h100: GpuSpec) -> None:
    put_in_force(slower(h100, tmp_path / "own.json", 5.0), name="trtllm")
    asked = slower(h100, tmp_path / "asked.json", 2.0)
    assert tpot_ms(calibration="shipped") < tpot_ms(calibration=str(asked)) < tpot_ms()


def test_micro_benchmarks_become_a_gpus_operators() -> None:
    arguments = ["calibrate", "--microbench", str(MICROBENCH), "--gpu", "h200", "--install"]
    result = CliRunner().invoke(planner, arguments)
    assert result.exit_code == 0, result.output
    assert "h200_sxm gemm bfloat16: 168 points" in result.output
    assert (own_folder() / "gpus" / "h200_sxm.json").is_file()
    found = compare(gpu="h200", engine="trtllm")
    assert set(found.operators) == {
        "gemm/bfloat16", "gemm/fp8", "attention_prefill/bfloat16", "attention_decode/bfloat16",
    }  # fmt: skip
    assert found.constants == ()
    # Another GPU's operators are not touched by them.
    assert compare(gpu="h100", engine="trtllm").operators == ()


def test_operators_of_another_gpu_and_constants_of_another_engine_are_refused(
    tmp_path: Path,
) -> None:
    out = tmp_path / "operators.json"
    arguments = ["calibrate", "--operators", str(MICROBENCH), "--gpu", "h200", "--out", str(out)]
    assert CliRunner().invoke(planner, arguments).exit_code == 0
    with pytest.raises(ProfileError, match="the operators of h200_sxm, not of h100_sxm"):
        tpot_ms(calibration=str(out))
    vllm = tmp_path / "vllm.json"
    vllm.write_text(
        json.dumps(engine_constants_to_json(load_calibration(load_gpu("h100"), "vllm")))
    )
    with pytest.raises(ProfileError, match="the step of vllm, not of trtllm"):
        tpot_ms(calibration=str(vllm))


def test_too_few_rows_are_said_and_leave_the_shipped_operators(tmp_path: Path) -> None:
    shutil.copytree(MICROBENCH, tmp_path / "tables")
    table = tmp_path / "tables" / "attention_context.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:50]) + "\n")
    arguments = ["calibrate", "--microbench", str(tmp_path / "tables"), "--gpu", "h200"]
    result = CliRunner().invoke(planner, [*arguments, "--install"])
    assert "h200_sxm attention_prefill: too few rows to fit" in result.output
    assert "attention_prefill/bfloat16" not in compare(gpu="h200", engine="trtllm").operators


def test_the_difference_names_constants_and_what_they_do_to_a_plan(
    tmp_path: Path, h100: GpuSpec
) -> None:
    request = api.PlanRequest(gpu="h100", workload="chat", trials=4)
    plan = api.plan(request)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()))
    asked = slower(h100, tmp_path / "slower.json")
    found = compare(gpu="", engine="", after=str(asked), plan=str(file))
    (constant,) = found.constants
    assert constant.name == "host_s"
    assert constant.ratio == pytest.approx(3.0)
    metrics = {change.name: change for change in found.metrics}
    expected = plan.recommended.value("tpot_ms.mean")
    assert metrics["tpot_ms.mean"].before == pytest.approx(expected, rel=0.02)
    assert metrics["tpot_ms.mean"].after > 1.02 * metrics["tpot_ms.mean"].before
    assert metrics["kv_cache_tokens"].ratio == 1.0
    result = CliRunner().invoke(
        planner, ["profiles", "diff", "--after", str(asked), "--plan", str(file)]
    )
    assert "host_s" in result.output
    assert "+200.0 %" in result.output
    shown = CliRunner().invoke(planner, ["profiles", "diff", "--json"])
    assert json.loads(shown.output) == {
        "constants": [], "intervals": [], "metrics": [], "operators": [],
    }  # fmt: skip


def test_a_constant_of_a_change_is_plain_json(h100: GpuSpec, tmp_path: Path) -> None:
    found = compare(gpu="h100", engine="trtllm", after=str(slower(h100, tmp_path / "s.json")))
    assert found.to_json()["constants"] == [asdict(found.constants[0])]


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        list_runs(str(tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--install"], "give --microbench DIR"),
        (["--microbench", "x", "--runs", "y", "--install"], "give --microbench DIR"),
        (["--microbench", "x", "--install"], "--microbench needs --gpu"),
        (["--runs", "x"], "say where the calibration goes"),
    ],
)
def test_half_a_question_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(planner, ["calibrate", *arguments])
    assert result.exit_code == 2
    assert words in result.output


def test_constants_of_one_gpus_machines_hold_there_alone(tmp_path: Path, h100: GpuSpec) -> None:
    """A host belongs to a machine: what was fitted beside an H100 says nothing beside an H200."""
    name = constants_name("trtllm", [h100.name])
    put_in_force(slower(h100, tmp_path / "own.json"), name=name)
    assert name == "gpus/h100_sxm-trtllm"
    assert files_in_force("", gpu="h100_sxm", engine="trtllm")
    assert not files_in_force("", gpu="h200_sxm", engine="trtllm")
    assert tpot_ms() > 1.02 * tpot_ms(calibration="shipped")
    assert constants_name("trtllm", ["h100_sxm", "h200_sxm"]) == "trtllm"
