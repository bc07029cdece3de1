"""Bytes: parameters and KV cache against published figures, capacity against measurements."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.calibration import Calibration
from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.gpu import GpuSpec
from cost_models.kv_cache import expected_block_waste, kv_layout
from cost_models.memory import plan_memory
from cost_models.profile_io import list_models, load_model
from cost_models.weights import parameter_count, weight_bytes
from engines.trtllm.cuda_graphs import captured_batch_sizes
from planner.validation.validate import validate

GOLDEN = Path(__file__).parents[1] / "golden" / "kv_bytes_per_token.csv"


def _golden_rows() -> list[dict[str, str]]:
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


@pytest.mark.parametrize("name", list_models())
def test_parameters_match_the_published_count(name: str) -> None:
    path = Path(__file__).parents[2] / "profiles" / "models" / f"{name}.json"
    published = json.loads(path.read_text())["published_parameters"]
    assert parameter_count(load_model(name)) == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("row", _golden_rows(), ids=lambda r: f"{r['model']}-{r['kv_cache_dtype']}")
def test_kv_bytes_per_token_are_exact(row: dict[str, str]) -> None:
    config = EngineConfig(kv_cache_dtype=row["kv_cache_dtype"])
    layout = kv_layout(load_model(row["model"]), config)
    assert layout.bytes_per_token == float(row["bytes_per_token"])


def test_kv_heads_are_replicated_when_tp_exceeds_them() -> None:
    model = load_model("qwen2.5-7b")
    whole = kv_layout(model, EngineConfig()).bytes_per_token
    at_4 = kv_layout(model, EngineConfig(tensor_parallel_size=4)).bytes_per_token
    at_7 = kv_layout(model, EngineConfig(tensor_parallel_size=7)).bytes_per_token
    assert at_4 == whole / 4
    assert at_7 == whole / 4


def test_a_sliding_window_sequence_stops_growing() -> None:
    layout = kv_layout(load_model("gpt-oss-20b"), EngineConfig())
    short, long = (float(layout.sequence_bytes(n, 32)) for n in (16_000, 32_000))
    full = layout.bytes_per_token * 32_000
    assert short < long < 0.6 * full


def test_block_waste_grows_with_the_block() -> None:
    lengths = [100, 333, 1000]
    waste = [expected_block_waste(lengths, block) for block in (1, 16, 64, 256)]
    assert waste[0] == 0
    assert waste == sorted(waste)
    assert waste[-1] == pytest.approx(1 - 1433 / (256 + 512 + 1024))


def test_fp8_checkpoint_of_llama_8b_is_as_large_as_vllm_loads() -> None:
    # vLLM 0.25.1 on an H200 logged 8.54 GiB for FP8 and 15.0 GiB for BF16 weights.
    model = load_model("llama-3.1-8b")
    fp8 = weight_bytes(model, EngineConfig(quantization="fp8")).total
    bf16 = weight_bytes(model, EngineConfig()).total
    assert fp8 == pytest.approx(8.54 * 2**30, rel=0.015)
    assert bf16 == pytest.approx(15.0 * 2**30, rel=0.01)


def test_tensor_parallel_size_must_divide_the_heads() -> None:
    with pytest.raises(ConfigError, match="does not divide the 28 heads"):
        weight_bytes(load_model("qwen2.5-7b"), EngineConfig(tensor_parallel_size=8))


def test_what_does_not_fit_says_by_how_much(h100: GpuSpec, h100_calibration: Calibration) -> None:
    memory = plan_memory(
        load_model("llama-3.1-70b"),
        EngineConfig(max_seq_len=4096),
        gpu=h100,
        engine=h100_calibration.traits,
        constants=h100_calibration.memory,
    )
    assert not memory.fits
    assert memory.shortfall_bytes > 50e9
    assert memory.binding == "weights and activations"


def test_bytes_are_conserved(h100: GpuSpec, h100_calibration: Calibration) -> None:
    memory = plan_memory(
        load_model("llama-3.1-8b"),
        EngineConfig(max_seq_len=8192),
        gpu=h100,
        engine=h100_calibration.traits,
        constants=h100_calibration.memory,
    )
    parts = (
        memory.weight_bytes_per_gpu
        + memory.activation_bytes_per_gpu
        + memory.communication_bytes_per_gpu
        + memory.runtime_bytes_per_gpu
        + memory.kv_cache_bytes_per_gpu
        + memory.reserved_bytes_per_gpu
    )
    assert float(parts) == pytest.approx(h100.memory_bytes)
    assert memory.communication_bytes_per_gpu == 0


def test_captured_batch_sizes_follow_the_engine() -> None:
    config = EngineConfig(cuda_graph_padding=True, cuda_graph_max_batch_size=512)
    assert captured_batch_sizes(config)[-4:] == (120, 128, 256, 512)
    assert captured_batch_sizes(replace(config, cuda_graph_max_batch_size=0)) == ()
    assert captured_batch_sizes(replace(config, max_batch_size=100))[-1] == 100


@pytest.mark.parametrize("gpu", ["h100_sxm", "gb300"])
def test_capacity_is_what_tensorrt_llm_held(shared: Path, gpu: str) -> None:
    result = validate(shared / "runs" / "trtllm_kv_capacity.jsonl")
    group = next(group for group in result.groups if group.gpu == gpu)
    assert group.metrics["max_sequences"].mape_pct < 2.0


def test_capacity_is_what_vllm_logged(shared: Path) -> None:
    result = validate(shared / "runs" / "h200_vllm" / "runs.jsonl")
    assert result.overall["kv_cache_tokens"].mape_pct < 2.0
