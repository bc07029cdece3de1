"""`planner measure --option backend=tensorrt`: from a knob to an engine that is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.profile_io import load_model
from engines.trtllm.engine_backend import checkpoint_script, engine_options
from tests.executor.conftest import STAND_INS
from tests.planner.measuring.test_measure import folder, planner

__all__ = ["folder"]

LLAMA = load_model("llama-3.1-8b")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_LLM", str(STAND_INS))


def test_a_precision_that_only_engines_load_is_measured(folder: Path) -> None:
    (folder / "tiny" / "model.safetensors").touch()
    common = (
        "measure", "--backend", "trtllm", "--model", "tiny", "--workload", "few.json",
        "--gpu", "h200", "--repeats", "1", "--set", "quantization=int8_wo",
    )  # fmt: skip
    refused = planner(folder, *common)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "--option backend=tensorrt" in refused.stderr

    result = planner(folder, *common, "--option", "backend=tensorrt")
    assert result.returncode == 0, result.stderr
    run = json.loads(planner(folder, "runs", "list", "--json").stdout)["runs"][0]
    assert run["status"] == "ok"
    assert run["engine"] == "trtllm-tensorrt"
    assert run["predicted"]["tpot_ms.mean"]["value"] > 0
    engine = next((folder / "planner-measure").glob("*-engine-*"))
    assert str(engine) in run["machine"]["command"]
    checkpoint = json.loads((engine / "config.json").read_text())["pretrained_config"]
    assert checkpoint["quantization"]["qformat"] == "int8_wo"
    assert checkpoint["source"] == str(folder / "tiny")


def test_options_of_an_engine_leave_out_what_is_built_in() -> None:
    config = EngineConfig(
        quantization="int8_sq", kv_cache_dtype="int8", enable_chunked_prefill=True
    )
    options = engine_options(config, LLAMA)
    assert options["kv_cache_config"] == {
        "enable_block_reuse": True,
        "free_gpu_memory_fraction": 0.9,
    }
    assert options["extended_runtime_perf_knob_config"]["cuda_graph_mode"] is True
    assert not {"cuda_graph_config", "stream_interval"} & set(options)


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype", "said"),
    [
        ("bf16", "bf16", "--qformat full_prec --dtype bfloat16"),
        ("int8_sq", "int8", "--qformat int8_sq --dtype auto"),
        ("w4a16_awq", "fp8", "--qformat int4_awq --dtype auto"),
    ],
)
def test_a_checkpoint_is_made_for_the_split(
    quantization: str, kv_cache_dtype: str, said: str
) -> None:
    config = EngineConfig(
        quantization=quantization, kv_cache_dtype=kv_cache_dtype, tensor_parallel_size=4
    )
    script = checkpoint_script(config, LLAMA)
    assert said in script
    assert "--tp_size 4 --pp_size 1" in script
    assert ("--kv_cache_dtype " in script) is (kv_cache_dtype != "bf16")


def test_a_precision_without_a_tool_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no engine of llama-3\.1-8b can be built"):
        checkpoint_script(EngineConfig(quantization="w4a16_gptq"), LLAMA)
    with pytest.raises(ConfigError, match="no engine of deepseek-v3 can be built"):
        checkpoint_script(EngineConfig(quantization="int8_wo"), load_model("deepseek-v3"))
