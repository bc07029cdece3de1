"""The files that deploy a configuration on TensorRT-LLM 1.2 and measure it there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from cost_models.model import ModelSpec
from engines.base import LaunchFiles, SampledLoad
from engines.trtllm.engine_backend import checkpoint_script, engine_options
from engines.trtllm.options import checked_options

DATASET_TOKENS = 2_000_000
"""Prompt tokens in dataset.jsonl at most, so that the file stays small."""

FIRST_PORT = 8000

ROUTER_PORT = 9000
"""Where the router listens, before servers from `FIRST_PORT` on."""

FILES = (
    "llm_api_options.yaml", "serve.sh", "bench.sh", "dataset.jsonl", "quantize.sh", "nginx.conf",
)  # fmt: skip
"""Every file of a plan beside plan.json; the last two where there is a checkpoint to make, and
where there are several servers."""

NGINX_METHODS: Mapping[str, str] = {"round_robin": "", "least_outstanding": "    least_conn;\n"}
"""How nginx's `upstream` is told a router; it knows nothing of prefixes."""

PUBLISHED_CHECKPOINTS: Mapping[tuple[str, str], str] = {
    ("llama-3.1-8b", "fp8"): "nvidia/Llama-3.1-8B-Instruct-FP8",
    ("llama-3.1-70b", "fp8"): "nvidia/Llama-3.1-70B-Instruct-FP8",
    ("llama-3.1-405b", "fp8"): "nvidia/Llama-3.1-405B-Instruct-FP8",
    ("llama-3.3-70b", "fp8"): "nvidia/Llama-3.3-70B-Instruct-FP8",
    ("llama-3.3-70b", "nvfp4"): "nvidia/Llama-3.3-70B-Instruct-FP4",
    ("deepseek-r1", "nvfp4"): "nvidia/DeepSeek-R1-FP4",
    ("mixtral-8x7b", "fp8"): "nvidia/Mixtral-8x7B-Instruct-v0.1-FP8",
}
"""Checkpoints on the hub that are already quantized, by model and quantization."""

MODELOPT_FORMATS: Mapping[str, str] = {
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "w4a16_awq": "int4_awq",
    "w4a8_awq": "w4a8_awq",
}
"""`--qformat` of ModelOpt's examples/llm_ptq/hf_ptq.py, and `--scheme` of `planner quantize`."""

ENGINE_ONLY = ("int8_wo", "int8_sq", "int4_wo")
"""Precisions that only the TensorRT engine backend loads."""

ENGINE_HINT = "planner measure builds an engine of it with --option backend=tensorrt"


def plan_files(deployment: Deployment, model: ModelSpec, load: SampledLoad) -> dict[str, str]:
    """Return the files of a deployment of one pool, by name.

    Raises:
        ConfigError: TensorRT-LLM would refuse it, or nobody makes its checkpoint.
    """
    import yaml  # noqa: PLC0415  only when files are written

    config = deployment.config
    options = checked_options(config, model)
    _refuse_line_breaks(model.hub_name)
    header = (
        "# Options of TensorRT-LLM 1.2 (trtllm-serve --config, trtllm-bench --config).\n"
        "# Weights are quantized in the checkpoint, not here"
    )
    header += {
        "fp8": ";\n# a checkpoint without FP8 KV scales is served with scales of 1.\n",
        "nvfp4": "; the checkpoint must carry NVFP4 KV scales too (kv_cache_config.dtype).\n",
    }.get(config.kv_cache_dtype, ".\n")
    files = {
        "llm_api_options.yaml": header + yaml.safe_dump(options, sort_keys=False),
        "serve.sh": _serve_script(deployment, model),
        "bench.sh": _bench_script(deployment, model, load.concurrency),
        "dataset.jsonl": _dataset(model, load),
    }
    script = build_script(config, model)
    files |= {"quantize.sh": script} if script else {}
    return files | ({"nginx.conf": _router(deployment)} if deployment.num_servers > 1 else {})


def launch_files(config: EngineConfig, model: ModelSpec, asked: Mapping[str, str]) -> LaunchFiles:
    """Return the options file and the script that makes the checkpoint, for either backend.

    Args:
        config: The configuration to launch.
        model: The model to serve.
        asked: Options of the backend; `backend=tensorrt` serves a built engine.

    Raises:
        ConfigError: TensorRT-LLM would refuse it, or nobody makes its checkpoint.
    """
    if asked.get("backend") == "tensorrt":
        return LaunchFiles(
            options=engine_options(config, model), build_script=checkpoint_script(config, model)
        )
    return LaunchFiles(
        options=checked_options(config, model), build_script=build_script(config, model)
    )


def build_script(config: EngineConfig, model: ModelSpec) -> str:
    """Return the script that makes the checkpoint; empty where the published one will do.

    Raises:
        ConfigError: Nobody makes it.
    """
    return _quantize_script(config, model) if needs_quantizing(config, model) else ""


def needs_quantizing(config: EngineConfig, model: ModelSpec) -> bool:
    """Whether the published checkpoint is not yet in the planned precision.

    An FP8 KV cache asks nothing of the weights: where a checkpoint carries no KV scales,
    TensorRT-LLM takes 1 for them, as its guides do for DeepSeek-R1 in FP8 blocks.
    """
    own = {model.checkpoint_quantization, "fp16"}
    return config.quantization not in own or config.kv_cache_dtype == "nvfp4"


def _checkpoint(config: EngineConfig, model: ModelSpec) -> str:
    if not needs_quantizing(config, model):
        return shlex.quote(model.hub_name)
    folder = f"{model.name}-{config.quantization}-kv-{config.kv_cache_dtype}"
    return f'"$here"/{shlex.quote(folder)}'


_PREAMBLE = """#!/usr/bin/env bash
# {purpose}
# Usage: {usage}
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
checkpoint=${{CHECKPOINT:-{checkpoint}}}
"""


def _preamble(purpose: str, usage: str, checkpoint: str) -> str:
    return _PREAMBLE.format(purpose=purpose, usage=usage, checkpoint=checkpoint)


def _serve_script(deployment: Deployment, model: ModelSpec) -> str:
    """Start a trtllm-serve for each server; all end together."""
    config = deployment.config
    script = _preamble(
        "Serves the plan's configuration with trtllm-serve (OpenAI API).",
        "[CHECKPOINT=DIR] [HOST=0.0.0.0] ./serve.sh   # in a TensorRT-LLM 1.2 container",
        _checkpoint(config, model),
    )
    script += "host=${HOST:-localhost}\npids=()\n"
    script += (
        "stop() { trap - EXIT INT TERM; "
        'kill "${pids[@]}" 2>/dev/null || true; wait || true; }\n'
        "trap 'stop' EXIT\ntrap 'stop; exit 130' INT\ntrap 'stop; exit 143' TERM\n"
    )
    for server in range(deployment.num_servers):
        first = server * config.num_gpus
        gpus = ",".join(str(first + rank) for rank in range(config.num_gpus))
        script += (
            f'CUDA_VISIBLE_DEVICES={shlex.quote(gpus)} trtllm-serve "$checkpoint" '
            f'--host "$host" --port {FIRST_PORT + server} --backend pytorch '
            '--config "$here/llm_api_options.yaml" &\npids+=($!)\n'
        )
    return script + 'wait -n "${pids[@]}"\n'


def _router(deployment: Deployment) -> str:
    """Return an nginx configuration that spreads requests over the servers of serve.sh."""
    method = NGINX_METHODS.get(deployment.router, "")
    servers = "".join(
        f"    server localhost:{FIRST_PORT + number};\n" for number in range(deployment.num_servers)
    )
    lacking = "" if deployment.router in NGINX_METHODS else " (nginx has none: round_robin)"
    return (
        f"# Router {deployment.router}{lacking} before the servers of serve.sh.\n"
        f"# Usage: nginx -c $PWD/nginx.conf   # then clients use port {ROUTER_PORT}\n"
        "daemon off;\npid nginx.pid;\nerror_log stderr;\nevents { worker_connections 4096; }\n"
        f"http {{\n  access_log off;\n  upstream servers {{\n{method}{servers}"
        "    keepalive 512;\n  }\n"
        f"  server {{\n    listen {ROUTER_PORT};\n    location / {{\n"
        "      proxy_pass http://servers;\n      proxy_http_version 1.1;\n"
        '      proxy_set_header Connection "";\n'
        "      proxy_buffering off;  # tokens are streamed\n"
        "      proxy_read_timeout 3600s;\n    }\n  }\n}\n"
    )


def _bench_script(deployment: Deployment, model: ModelSpec, concurrency: int) -> str:
    """One server under its share of the load, with the flags that agree with the YAML."""
    config = deployment.config
    arguments = [
        "throughput",
        "--backend", "pytorch",
        "--dataset", '"$here/dataset.jsonl"',
        "--config", '"$here/llm_api_options.yaml"',
        "--tp", str(config.tensor_parallel_size),
        "--pp", str(config.pipeline_parallel_size),
        "--max_batch_size", str(config.max_batch_size),
        "--max_num_tokens", str(config.max_num_tokens),
        "--max_seq_len", str(config.max_seq_len or model.max_position_embeddings),
        "--kv_cache_free_gpu_mem_fraction", f"{config.free_gpu_memory_fraction:g}",
        "--scheduler_policy", bench_policy(config),
        chunked_flag(config),
        "--streaming",
        "--report_json", '"$here/report.json"',
        "--request_json", '"$here/requests.json"',
    ]  # fmt: skip
    if model.is_moe:
        arguments += ["--ep", str(config.moe_expert_parallel_size)]
    if concurrency:
        clients = max(concurrency // deployment.num_servers, 1)
        arguments += ["--concurrency", str(clients)]
    script = _preamble(
        "Measures one server of the plan with trtllm-bench.",
        "[CHECKPOINT=DIR] ./bench.sh   # in a TensorRT-LLM 1.2 container",
        _checkpoint(config, model),
    )
    name = shlex.quote(model.hub_name)
    # --model takes a name only; a folder goes to --model_path.
    script += f"model=(--model {name})\n"
    script += 'if [ -d "$checkpoint" ]; then model+=(--model_path "$checkpoint"); fi\n'
    return script + f'trtllm-bench "${{model[@]}}" {" ".join(arguments)}\n'


def bench_policy(config: EngineConfig) -> str:
    """Return `--scheduler_policy` of trtllm-bench, which knows two policies."""
    policy = config.capacity_scheduler_policy
    return "max_utilization" if policy == "MAX_UTILIZATION" else "guaranteed_no_evict"


def _quantize_script(config: EngineConfig, model: ModelSpec) -> str:
    """Make the checkpoint with ModelOpt, or name the one that is published."""
    target = _checkpoint(config, model)
    script = _preamble(
        f"Makes the {config.quantization} checkpoint that serve.sh and bench.sh take.",
        "MODELOPT=/path/to/TensorRT-Model-Optimizer ./quantize.sh",
        target,
    )
    published = PUBLISHED_CHECKPOINTS.get((model.name, config.quantization))
    if published:
        script += f"# Published already: CHECKPOINT={shlex.quote(published)} ./serve.sh\n"
    source = shlex.quote(model.hub_name)
    kv_format = config.kv_cache_dtype if config.kv_cache_dtype in ("fp8", "nvfp4") else "none"
    weights = MODELOPT_FORMATS.get(config.quantization, "")
    if not weights:
        if config.quantization != model.checkpoint_quantization:
            raise ConfigError(
                f"quantization={config.quantization}: no tool writes it for {model.name}",
                hint=ENGINE_HINT if config.quantization in ENGINE_ONLY else "",
            )
        weights = "none"
    if weights != "none":
        script += (
            "# The same without a checkout, from a folder of the BF16 checkpoint:\n"
            f"#   planner quantize --model DIR --scheme {weights} "
            f"--kv-cache-dtype {kv_format.replace('none', 'bf16')} "
            "--calibration-data FILE --out DIR\n"
        )
    return script + (
        "modelopt=${MODELOPT:?set MODELOPT to a checkout of TensorRT-Model-Optimizer}\n"
        'python3 "$modelopt/examples/llm_ptq/hf_ptq.py" '
        f"--pyt_ckpt_path {source} --qformat {weights} --kv_cache_qformat {kv_format} "
        f'--inference_tensor_parallel {config.tensor_parallel_size} --export_path "$checkpoint"\n'
    )


def chunked_flag(config: EngineConfig) -> str:
    """Return the flag of trtllm-bench that agrees with `enable_chunked_prefill`."""
    if config.enable_chunked_prefill:
        return "--enable_chunked_context"
    return "--disable_chunked_context"


def _dataset(model: ModelSpec, load: SampledLoad) -> str:
    """Requests in trtllm-bench's form; token ids are random, lengths are the workload's."""
    lines: list[str] = []
    tokens = 0
    for number, (prompt, output) in enumerate(zip(load.isl, load.osl, strict=True)):
        tokens += prompt
        if lines and tokens > DATASET_TOKENS:
            break
        ids = load.rng.integers(10, model.vocab_size - 10, size=prompt).tolist()
        record = {"task_id": number, "input_ids": ids, "output_tokens": output}
        lines.append(json.dumps(record, separators=(",", ":")))
    return "\n".join(lines) + "\n"


def _refuse_line_breaks(text: str) -> None:
    if any(ord(character) < 32 for character in text):
        raise ConfigError(f"model name {text!r} has a control character in it")
