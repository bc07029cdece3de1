"""The files of TensorRT-LLM: what it would accept, and scripts that really run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cost_models.cluster import Cluster
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.model import ModelSpec
from cost_models.profile_io import load_gpu, load_model
from engines.trtllm.options import llm_api_options, option_problems
from engines.trtllm.read_options import config_from_options
from engines.trtllm.scripts import plan_files
from planner.plans.artifacts import sampled_load
from planner.workloads.workload import load_workload

STAND_INS = Path(__file__).parents[1] / "stand_ins"


def deployment_files(
    config: EngineConfig, model: ModelSpec, *, num_servers: int = 1
) -> dict[str, str]:
    cluster = Cluster(gpu=load_gpu("h100"), num_gpus=num_servers * config.num_gpus)
    deployment = Deployment.of(config, cluster, num_servers=num_servers)
    return plan_files(deployment, model, sampled_load(load_workload("chat")))


CONFIGS = [
    ("llama-3.1-8b", EngineConfig(max_seq_len=4096, enable_piecewise_cuda_graph=True)),
    (
        "llama-3.3-70b",
        EngineConfig(
            quantization="fp8",
            kv_cache_dtype="fp8",
            tensor_parallel_size=2,
            enable_chunked_prefill=True,
            cuda_graph_padding=True,
            max_batch_size=200,
            cuda_graph_max_batch_size=200,
            max_seq_len=8192,
        ),
    ),
    (
        "deepseek-r1",
        EngineConfig(
            quantization="fp8_block",
            tensor_parallel_size=8,
            moe_expert_parallel_size=8,
            enable_attention_dp=True,
            tokens_per_block=64,
            max_seq_len=8192,
        ),
    ),
    ("gpt-oss-120b", EngineConfig(quantization="w4a16_mxfp4", cuda_graph_max_batch_size=0)),
    (
        "llama-3.1-8b",
        EngineConfig(decoding_type="NGram", max_draft_len=5, disable_overlap_scheduler=True),
    ),
    (
        "llama-3.1-70b",
        EngineConfig(
            decoding_type="DraftTarget",
            max_draft_len=3,
            speculative_model="meta-llama/Llama-3.2-1B-Instruct",
            disable_overlap_scheduler=True,
        ),
    ),
    (
        "llama-3.1-8b",
        EngineConfig(
            decoding_type="Eagle",
            max_draft_len=4,
            speculative_model="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        ),
    ),
    (
        "deepseek-v3",
        EngineConfig(
            quantization="fp8_block",
            tensor_parallel_size=8,
            tokens_per_block=64,
            decoding_type="MTP",
            max_draft_len=3,
        ),
    ),
]

every_config = pytest.mark.parametrize(
    ("name", "config"), CONFIGS, ids=[f"{name}{config.decoding_type}" for name, config in CONFIGS]
)


@every_config
def test_yaml_passes_our_own_table(name: str, config: EngineConfig) -> None:
    assert option_problems(llm_api_options(config, load_model(name))) == []


@every_config
def test_yaml_passes_tensorrt_llms_schema(shared: Path, name: str, config: EngineConfig) -> None:
    schema = json.loads((shared / "trtllm" / "llm_args.schema.json").read_text())
    text = deployment_files(config, load_model(name))["llm_api_options.yaml"]
    jsonschema.validate({"model": name} | yaml.safe_load(text), schema)


def test_the_table_refuses_what_the_engine_refuses() -> None:
    options = llm_api_options(EngineConfig(), load_model("llama-3.1-8b"))
    assert option_problems(options | {"kv_cache_free_gpu_memory_fraction": 0.8})
    assert option_problems(options | {"max_batch_size": "many"})
    assert option_problems(options | {"kv_cache_config": {"dtype": "int8"}})


@every_config
def test_yaml_reads_back_as_the_same_configuration(name: str, config: EngineConfig) -> None:
    model = load_model(name)
    options = yaml.safe_load(yaml.safe_dump(llm_api_options(config, model)))
    base = replace(config, max_batch_size=1, max_num_tokens=1, tokens_per_block=1)
    read, _ = config_from_options(options, base)
    assert replace(read, max_seq_len=0, cuda_graph_max_batch_size=0) == replace(
        config, max_seq_len=0, cuda_graph_max_batch_size=0
    )


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (
            EngineConfig(decoding_type="NGram", max_draft_len=5, max_matching_ngram_size=3),
            {"decoding_type": "NGram", "max_draft_len": 5, "max_matching_ngram_size": 3},
        ),
        (
            EngineConfig(
                decoding_type="DraftTarget", max_draft_len=3, speculative_model="llama-3.2-1b"
            ),
            {
                "decoding_type": "DraftTarget",
                "max_draft_len": 3,
                "speculative_model": "meta-llama/Llama-3.2-1B-Instruct",
            },
        ),
        (
            EngineConfig(decoding_type="Eagle", max_draft_len=4, speculative_model="a/b"),
            {"decoding_type": "Eagle", "max_draft_len": 4, "speculative_model": "a/b"},
        ),
        # 1.2.1 takes MTP's draft length from its number of layers.
        (
            EngineConfig(decoding_type="MTP", max_draft_len=2),
            {"decoding_type": "MTP", "num_nextn_predict_layers": 2},
        ),
    ],
)
def test_drafts_are_spelled_as_version_1_2_does(
    config: EngineConfig, written: dict[str, Any]
) -> None:
    options = llm_api_options(config, load_model("deepseek-v3"))
    assert options["speculative_config"] == written
    # N-grams and draft models wait for the tokens of the step before.
    waits = config.decoding_type in ("NGram", "DraftTarget")
    assert options["disable_overlap_scheduler"] is waits


def test_a_scheme_that_the_engine_lacks_is_not_written() -> None:
    config = EngineConfig(decoding_type="Medusa", max_draft_len=2, speculative_model="a/b")
    with pytest.raises(ConfigError, match="Medusa"):
        llm_api_options(config, load_model("llama-3.1-8b"))


def test_an_mtp_yaml_without_a_length_drafts_one_token() -> None:
    read, _ = config_from_options({"speculative_config": {"decoding_type": "MTP"}}, EngineConfig())
    assert (read.decoding_type, read.max_draft_len) == ("MTP", 1)


def test_defaults_that_differ_between_serve_and_bench_are_written() -> None:
    options = llm_api_options(EngineConfig(), load_model("llama-3.1-8b"))
    assert options["enable_chunked_prefill"] is False
    assert options["kv_cache_config"]["enable_block_reuse"] is True
    text = "".join(deployment_files(EngineConfig(), load_model("llama-3.1-8b")).values())
    assert "trust_remote_code" not in text


@pytest.mark.parametrize("name", ["a b", "$(touch pwned)", "it's", 'a"b', "a;b"])
def test_hostile_model_names_are_quoted(tmp_path: Path, name: str) -> None:
    model = replace(load_model("llama-3.1-8b"), hub_name=name)
    files = deployment_files(EngineConfig(max_seq_len=4096), model)
    _write_scripts(tmp_path, files)
    _run_bench(tmp_path)
    assert json.loads((tmp_path / "seen.json").read_text())["model"] == name
    assert not (tmp_path / "pwned").exists()


def test_a_line_break_in_a_name_is_refused() -> None:
    model = replace(load_model("llama-3.1-8b"), hub_name="a\nb")
    with pytest.raises(ConfigError):
        deployment_files(EngineConfig(), model)


@every_config
def test_bench_sh_runs_with_flags_that_exist(
    tmp_path: Path, name: str, config: EngineConfig
) -> None:
    files = deployment_files(config, load_model(name))
    _write_scripts(tmp_path, files)
    _run_bench(tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["tp"] == str(config.tensor_parallel_size)
    for script in tmp_path.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_sh_ends_every_server(tmp_path: Path, how: signal.Signals) -> None:
    name, config = CONFIGS[1]
    _write_scripts(tmp_path, deployment_files(config, load_model(name), num_servers=2))
    server = subprocess.Popen(
        ["bash", str(tmp_path / "serve.sh")], env=_environment(tmp_path), start_new_session=True
    )
    pids = [tmp_path / f"port-{port}.pid" for port in (8000, 8001)]
    _wait_for(lambda: all(path.exists() for path in pids))
    server.send_signal(how)
    server.wait(timeout=20)
    _wait_for(lambda: not any(_alive(int(path.read_text())) for path in pids))
    gpus = {(tmp_path / f"port-{port}.gpus").read_text() for port in (8000, 8001)}
    assert gpus == {"0,1", "2,3"}


def _write_scripts(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def _environment(folder: Path) -> dict[str, str]:
    path = f"{STAND_INS}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SEEN_DIR": str(folder)}


def _run_bench(folder: Path) -> None:
    subprocess.run(
        ["bash", str(folder / "bench.sh")],
        env=_environment(folder),
        cwd=folder,
        check=True,
        timeout=60,
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for(condition: object, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize("router", ["round_robin", "least_outstanding", "prefix_aware"])
def test_several_servers_get_a_router(tmp_path: Path, router: str) -> None:
    cluster = Cluster(gpu=load_gpu("h100"), num_gpus=3)
    deployment = Deployment.of(EngineConfig(), cluster, num_servers=3).with_knobs(router=router)
    model = load_model("llama-3.1-8b")
    load = sampled_load(load_workload("chat"))
    text = plan_files(deployment, model, load)["nginx.conf"]
    assert all(f"server localhost:{port};" in text for port in (8000, 8001, 8002))
    assert ("least_conn;" in text) == (router == "least_outstanding")
    assert ("nginx has none" in text) == (router == "prefix_aware")
    assert "nginx.conf" not in plan_files(deployment.with_knobs(num_servers=1), model, load)
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed: what it would say of the file is not known")
    path = tmp_path / "nginx.conf"
    path.write_text(text)
    subprocess.run([nginx, "-t", "-c", str(path), "-p", str(tmp_path)], check=True)
