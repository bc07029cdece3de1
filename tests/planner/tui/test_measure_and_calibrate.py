"""Plan, measure with the embedded backend and a tiny model, calibrate, plan again; and failures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Input

from executor.machine import GpuSample
from executor.observe import Observation
from executor.store import RunStore
from planner.tui.calibrating import validated
from planner.tui.messages import MeasurementSeen
from planner.tui.screens.calibrate import CalibrateScreen
from planner.tui.screens.measure import MeasureScreen
from planner.tui.screens.runs import RunsScreen
from planner.tui.screens.what_if import WhatIfScreen
from planner.tui.widgets.candidate_list import CandidateList
from planner.tui.worker import worker
from tests.executor.test_backends import marked_processes
from tests.planner.tui.driving import (
    SMALL,
    app_of,
    fill,
    plain,
    planned,
    planner_at,
    problem_at,
    sees,
    shown,
    text_of,
    until,
)  # fmt: skip

pytestmark = pytest.mark.asyncio

NVML_OF_ONE_GPU = """
from pathlib import Path
from types import SimpleNamespace

class NVMLError(Exception):
    pass

NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = 0

def nvmlInit(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return "NVIDIA H100 80GB HBM3"

def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(total=_told(80e9), used=2e9)

def nvmlDeviceGetPowerUsage(handle):
    return _told(400e3)

def _told(value):
    if (Path(__file__).parent / "gone").exists():
        raise NVMLError("GPU is lost")
    return value
"""
"""Stands in for NVML: one GPU, until a file `gone` lies beside it."""

DATA = Path(__file__).parents[2] / "data"

TINY = {
    "model": str(DATA / "tiny-llama"),
    "workload": str(DATA / "few.json"),
    "settings": "max_batch_size=4 max_num_tokens=64 tokens_per_block=16",
}


async def test_plan_measure_calibrate_and_plan_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    async with planner_at(tmp_path) as pilot:
        before = (await planned(pilot)).planner_app.session
        screen = await _measure_screen(pilot, repeats="1", store=str(tmp_path / "runs.db"))
        await pilot.press("ctrl+r")
        await until(pilot, lambda: screen.live.load is not None, 60)
        await until(pilot, lambda: not screen.is_measuring, 60)
        await until(pilot, lambda: "1 run is in" in text_of(pilot, "#measure-words"))
        await until(pilot, lambda: "run 1" in plain(screen.query_one("#beside")))
        assert screen.live.load is not None
        assert screen.live.load.num_tokens == 6 * 4
        assert marked_processes() == set()
        # A CPU has no cost model: its runs are listed as skipped, with the reason.
        await pilot.press("f7")
        calibrate = pilot.app.screen
        assert isinstance(calibrate, CalibrateScreen)
        await _open(pilot, tmp_path / "runs.db")
        await until(pilot, lambda: "0 runs predicted, 1 skipped" in text_of(pilot, "#runs-words"))
        await _open(pilot, slow_runs(tmp_path))
        await until(pilot, lambda: "2 runs predicted" in text_of(pilot, "#runs-words"))
        await pilot.press("ctrl+r")
        await until(pilot, lambda: calibrate.fit is not None, 60)
        assert "✓ tpot_ms.mean" in plain(calibrate.query_one("#errors"))
        assert not app_of(pilot).own_calibrations()
        await pilot.press("ctrl+a")
        await until(pilot, lambda: "yours for trtllm" in plain(calibrate.query_one("#in-force")))
        await pilot.press("f2")
        await until(pilot, lambda: app_of(pilot).session is not before)
        after = app_of(pilot).session
        assert before is not None
        assert after is not None
        assert after.calibration == app_of(pilot).own_calibrations()["trtllm"]
        slower = after.plan.recommended.value("tpot_ms.mean")
        assert slower > 1.05 * before.plan.recommended.value("tpot_ms.mean")
        await pilot.press("f7", "ctrl+o")
        assert not app_of(pilot).own_calibrations()


async def test_what_cannot_be_measured_is_said_at_its_field(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f5")
        screen = pilot.app.screen
        assert isinstance(screen, MeasureScreen)
        await until(pilot, lambda: bool(screen.backends))
        if "vllm" in screen.refused:
            await fill(pilot, "backend", "vllm")
            install = "pip install 'trtllm-planner[vllm]'"
            await until(pilot, lambda: install in problem_at(pilot, "backend"))
        await fill(pilot, "backend", "torch")
        await until(pilot, lambda: "unknown; known:" in problem_at(pilot, "backend"))
        await fill(pilot, "budget", "0")
        await until(pilot, lambda: "accepted: 1 to" in problem_at(pilot, "budget"))
        await fill(pilot, "settings", "max_batch_size")
        await until(pilot, lambda: "is not knob=value" in problem_at(pilot, "settings"))
        assert not screen.is_measuring


async def test_a_gpu_that_vanishes_becomes_a_notice(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f5")
        screen = pilot.app.screen
        screen.query_one("#live").display = True
        here = GpuSample(memory_used_bytes=70e9, power_w=400.0, sm_clock_hz=1.98e9)
        for gpu in (here, GpuSample()):
            seen = Observation(phase="run 1", left_s=9.0, gpus=(gpu,), kv_used_fraction=0.5)
            screen.post_message(MeasurementSeen(seen, "a line of the log"))
        await until(pilot, lambda: "does not answer NVML any more" in shown(pilot))
        assert "✗ does not answer" in plain(screen.query_one("#gpus"))
        assert "50.0 % used" in plain(screen.query_one("#figures"))
        assert "a line of the log" in plain(screen.query_one("#log"))


async def test_a_gpu_vanishes_and_the_measurement_goes_on_until_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pynvml.py").write_text(NVML_OF_ONE_GPU)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{DATA.parents[1]}")
    worker("measure").close()  # the next one reads the stand-in
    async with planner_at(tmp_path, workload="nothing") as pilot:
        store = str(tmp_path / "runs.db")
        screen = await _measure_screen(pilot, requests="100000", repeats="1", store=store)
        await pilot.press("ctrl+r")
        await until(pilot, lambda: bool(screen.live.gpus and screen.live.load), 90)
        await until(pilot, lambda: "400" in plain(screen.query_one("#gpus")))
        (tmp_path / "gone").touch()
        await until(pilot, lambda: "does not answer NVML any more" in shown(pilot))
        await until(pilot, lambda: "✗ does not answer" in plain(screen.query_one("#gpus")))
        tokens = _num_tokens(screen)
        await until(pilot, lambda: _num_tokens(screen) > tokens)
        await pilot.press("escape")
        await until(pilot, lambda: not screen.is_measuring, 30)
        await until(pilot, lambda: "Stopped" in text_of(pilot, "#measure-words"))
        assert marked_processes() == set()
        assert [run.status for run in RunStore(store).runs()] == ["interrupted"]
    worker("measure").close()


async def test_the_simulation_follows_the_closed_form(tmp_path: Path) -> None:
    async with planner_at(tmp_path, SMALL) as pilot:
        await planned(pilot)
        await pilot.press("f3")
        screen = pilot.app.screen
        assert isinstance(screen, WhatIfScreen)
        await until(pilot, lambda: screen.simulated is not None)
        await until(pilot, lambda: text_of(pilot, "#differences").startswith("Simulated"))
        await pilot.press("v")  # from the words to the curve
        for words in ("KV blocks of", "ms per step", "sequences of all engines"):
            await pilot.press("v")
            await sees(pilot, words)
        await pilot.press("right")
        await until(pilot, lambda: bool(screen.settings) and screen.simulated is not None)
        assert screen.simulated is not None
        changed = screen.simulated.prediction.config
        assert changed != app_of(pilot).session.plan.recommended.config  # type: ignore[union-attr]


async def test_two_plans_stand_side_by_side(tmp_path: Path) -> None:
    async with planner_at(tmp_path, workload="nothing") as pilot:
        await pilot.press("f6")
        screen = pilot.app.screen
        assert isinstance(screen, RunsScreen)
        for name, batch, tpot in (("a", 64, 5.0), ("b", 128, 6.0)):
            await _open(pilot, _plan(tmp_path / name / "plan.json", batch, tpot))
        await until(pilot, lambda: screen.query_one(DataTable).row_count == 2)
        await pilot.press("c", "up")
        await until(pilot, lambda: "-16.7 %" in text_of(pilot, "#run"))
        text = text_of(pilot, "#run")
        assert "max_batch_size" in text
        assert "-50.0 %" in text
        await pilot.press("enter")
        await until(pilot, lambda: '"objective": "goodput"' in shown(pilot))
        await pilot.press("escape", "ctrl+s")
        out = tmp_path / "both.json"
        pilot.app.screen.query_one(Input).value = str(out)
        await pilot.press("enter")
        await until(pilot, out.exists)
        assert [plan["status"] for plan in json.loads(out.read_text())] == ["feasible"] * 2
        (tmp_path / "no.json").write_text("{}")
        await pilot.press("slash")
        await _open(pilot, tmp_path / "no.json")
        await until(pilot, lambda: "not a plan" in text_of(pilot, "#runs-words"))


def _num_tokens(screen: MeasureScreen) -> int:
    return screen.live.load.num_tokens if screen.live.load else 0


async def _measure_screen(pilot: Pilot[int], **values: str) -> MeasureScreen:
    await pilot.press("f5")
    screen = pilot.app.screen
    assert isinstance(screen, MeasureScreen)
    await until(pilot, lambda: bool(screen.backends))
    for name, value in {**TINY, **values}.items():
        screen.query_one(f"#field-{name} Input", Input).value = value
    candidates = screen.query_one(CandidateList)
    candidates.mark_only(len(candidates.names) - 1)
    return screen


async def _open(pilot: Pilot[int], path: Path) -> None:
    field = pilot.app.screen.query_one("#runs-file", Input)
    field.value = str(path)
    field.focus()
    await pilot.press("enter")


def slow_runs(folder: Path) -> Path:
    """Two runs of an engine whose tokens take 30 % longer than is predicted of it."""
    path = folder / "slow.jsonl"
    runs = [
        {
            "run_id": f"slow-{clients}", "gpu": "h100_sxm", "num_gpus": 1, "engine": "trtllm",
            "engine_version": "1.2", "model": "llama-3.1-8b",
            "config": {"quantization": "fp8", "max_batch_size": 8, "max_seq_len": 1024},
            "workload": {
                "protocol": "closed_loop", "concurrency": clients, "num_requests": 2 * clients,
                "isl": 128, "osl": 16,
            },
        }
        for clients in (1, 4)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    for run, row in zip(runs, validated(str(path), {}).rows, strict=True):
        run["measured"] = {"tpot_ms": {"mean": 1.3 * row.predicted["tpot_ms.mean"]}}
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return path


def _plan(path: Path, batch: int, tpot_ms: float) -> Path:
    said = {"value": tpot_ms, "interval_90": [0.9 * tpot_ms, 1.1 * tpot_ms]}
    names = ("tpot_ms.mean", "ttft_ms.mean", "output_tok_per_s_per_gpu")
    best = {"config": {"max_batch_size": batch}, "predicted": dict.fromkeys(names, said)}
    path.parent.mkdir()
    path.write_text(
        json.dumps(
            {"schema_version": 1, "status": "feasible", "objective": "goodput", "recommended": best}
        )
    )
    return path
