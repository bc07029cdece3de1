"""Writes the files that deploy a plan on TensorRT-LLM 1.2.

The YAML beats the command line in trtllm-serve and trtllm-bench, so everything that
matters stands in it, also what the two would otherwise default differently.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cost_models.engine import EngineConfig
from cost_models.engine_profile_io import load_engine
from cost_models.errors import ConfigError, ProfileError
from cost_models.model import ModelSpec
from cost_models.profile_io import load_model
from cost_models.speculation import SYNCHRONOUS
from planner.knobs import flattened

if TYPE_CHECKING:
    from planner.api import Problem
    from planner.plans.plan import Plan
    from planner.workloads.workload import Workload

DATASET_REQUESTS = 500
"""Requests in dataset.jsonl, fewer where prompts are long."""

DATASET_TOKENS = 2_000_000
"""Prompt tokens in dataset.jsonl at most, so that the file stays small."""

FIRST_PORT = 8000

FILES = (
    "plan.json", "llm_api_options.yaml", "serve.sh", "bench.sh", "dataset.jsonl", "quantize.sh",
)  # fmt: skip

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

EMITTED_OPTIONS: Mapping[str, type | tuple[Any, ...]] = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "moe_expert_parallel_size": int,
    "moe_tensor_parallel_size": int,
    "enable_attention_dp": bool,
    "max_batch_size": int,
    "max_num_tokens": int,
    "max_seq_len": int,
    "enable_chunked_prefill": bool,
    "disable_overlap_scheduler": bool,
    "stream_interval": int,
    "allreduce_strategy": (
        "AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL",
        "NCCL_SYMMETRIC",
    ),
    "kv_cache_config.enable_block_reuse": bool,
    "kv_cache_config.enable_partial_reuse": bool,
    "kv_cache_config.host_cache_size": int,
    "kv_cache_config.free_gpu_memory_fraction": float,
    "kv_cache_config.tokens_per_block": int,
    "kv_cache_config.max_tokens": int,
    "kv_cache_config.dtype": ("auto", "fp8", "nvfp4"),
    "scheduler_config.capacity_scheduler_policy": (
        "GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH",
    ),
    "scheduler_config.context_chunking_policy": ("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"),
    "cuda_graph_config.enable_padding": bool,
    "cuda_graph_config.max_batch_size": int,
    "speculative_config.decoding_type": ("NGram", "DraftTarget", "Eagle", "MTP"),
    "speculative_config.max_draft_len": int,
    "speculative_config.num_nextn_predict_layers": int,
    "speculative_config.max_matching_ngram_size": int,
    "speculative_config.speculative_model": str,
    "torch_compile_config.enable_piecewise_cuda_graph": bool,
    "moe_config.backend": (
        "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON",
    ),
}  # fmt: skip
"""Every option that the YAML may hold, with its type or its values (TensorRT-LLM 1.2.1)."""


def llm_api_options(config: EngineConfig, model: ModelSpec) -> dict[str, Any]:
    """Return the content of llm_api_options.yaml."""
    kv_cache: dict[str, Any] = {
        "enable_block_reuse": config.enable_block_reuse,
        "free_gpu_memory_fraction": config.free_gpu_memory_fraction,
        "tokens_per_block": config.tokens_per_block,
        "dtype": config.kv_cache_dtype if config.kv_cache_dtype in ("fp8", "nvfp4") else "auto",
    }
    if not config.enable_partial_reuse:
        kv_cache["enable_partial_reuse"] = False
    if config.host_cache_size:
        kv_cache["host_cache_size"] = config.host_cache_size
    if config.kv_cache_max_tokens:
        kv_cache["max_tokens"] = config.kv_cache_max_tokens
    scheduler = {"capacity_scheduler_policy": config.capacity_scheduler_policy}
    if config.enable_chunked_prefill:
        scheduler["context_chunking_policy"] = config.context_chunking_policy
    options: dict[str, Any] = {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enable_attention_dp": config.enable_attention_dp,
        "max_batch_size": config.max_batch_size,
        "max_num_tokens": config.max_num_tokens,
        "max_seq_len": config.max_seq_len or model.max_position_embeddings,
        "enable_chunked_prefill": config.enable_chunked_prefill,
        "disable_overlap_scheduler": config.disable_overlap_scheduler or _waits_for_drafts(config),
        "stream_interval": config.stream_interval,
        "kv_cache_config": kv_cache,
        "scheduler_config": scheduler,
        "cuda_graph_config": _cuda_graph_options(config),
    }
    if model.is_moe:
        options["moe_expert_parallel_size"] = config.moe_expert_parallel_size
        options["moe_tensor_parallel_size"] = config.moe_tensor_parallel_size
        options["moe_config"] = {"backend": config.moe_backend}
    if config.speculates:
        options["speculative_config"] = _speculative_options(config)
    if config.enable_piecewise_cuda_graph:
        options["torch_compile_config"] = {"enable_piecewise_cuda_graph": True}
    if config.allreduce_strategy != "AUTO":
        options["allreduce_strategy"] = config.allreduce_strategy
    return options


def _waits_for_drafts(config: EngineConfig) -> bool:
    return config.speculates and config.decoding_type in SYNCHRONOUS


def _speculative_options(config: EngineConfig) -> dict[str, Any]:
    """Return `speculative_config` in the engine's own words."""
    kind = config.decoding_type
    rule = load_engine("trtllm").speculation.get(kind)
    if rule is None:
        raise ConfigError(f"TensorRT-LLM 1.2 would refuse decoding_type={kind}")
    found: dict[str, Any] = {"decoding_type": rule.name, rule.length_option: config.max_draft_len}
    if kind == "NGram":
        found["max_matching_ngram_size"] = config.max_matching_ngram_size
    if rule.needs_model:
        found["speculative_model"] = _draft_checkpoint(config)
    return found


def _draft_checkpoint(config: EngineConfig) -> str:
    """Return where the draft's weights are: a path as given, else the name on the hub."""
    name = config.speculative_model
    if config.decoding_type != "DraftTarget" or Path(name).exists():
        return name
    return load_model(name).hub_name


def option_problems(options: Mapping[str, Any]) -> list[str]:
    """Return what TensorRT-LLM 1.2 would refuse in the options that we write."""
    problems = []
    for path, value in flattened(options):
        if path == "cuda_graph_config" and value is None:
            continue
        expected = EMITTED_OPTIONS.get(path)
        if expected is None:
            problems.append(f"{path}: not an option")
        elif isinstance(expected, tuple):
            if value not in expected:
                problems.append(f"{path}={value!r}: accepted: {', '.join(expected)}")
        elif type(value) is not expected and not (expected is float and type(value) is int):
            problems.append(f"{path}={value!r}: not of type {expected.__name__}")
    return problems


def write_plan_files(
    plan: Plan, *, problem: Problem, folder: Path, seed: int = 0
) -> tuple[str, ...]:
    """Write plan.json and the files that deploy it, all or nothing, and return their names.

    Only TensorRT-LLM gets files of its own: a plan for vLLM is run by `planner measure`.

    Raises:
        ProfileError: The folder holds files that are not a plan's.
        ConfigError: The configuration cannot be written for TensorRT-LLM.
    """
    config = plan.recommended.config
    contents = {"plan.json": json.dumps(plan.to_json(), indent=2, allow_nan=False) + "\n"}
    if problem.rules.name == "trtllm":
        num_servers = plan.recommended.deployment.num_servers
        contents |= deployment_files(
            config, problem.model, problem.workload, num_servers=num_servers, seed=seed
        )
    _check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, text in contents.items():
            _write(staging / name, text)
        folder.mkdir(exist_ok=True)
        for name in contents:
            os.replace(staging / name, folder / name)
        for stale in set(FILES) - set(contents):
            (folder / stale).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return tuple(contents)


def deployment_files(
    config: EngineConfig,
    model: ModelSpec,
    workload: Workload,
    *,
    num_servers: int = 1,
    seed: int = 0,
) -> dict[str, str]:
    """Return the TensorRT-LLM files of like servers of a configuration, by name."""
    import yaml  # noqa: PLC0415  only when files are written

    options = llm_api_options(config, model)
    problems = option_problems(options)
    if problems:
        raise ConfigError(f"TensorRT-LLM 1.2 would refuse {problems[0]}")
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
        "serve.sh": _serve_script(config, model, num_servers),
        "bench.sh": _bench_script(config, model, workload, num_servers),
        "dataset.jsonl": _dataset(model, workload, seed),
    }
    if needs_quantizing(config, model):
        files["quantize.sh"] = _quantize_script(config, model)
    return files


def needs_quantizing(config: EngineConfig, model: ModelSpec) -> bool:
    """Whether the published checkpoint is not yet in the planned precision.

    An FP8 KV cache asks nothing of the weights: where a checkpoint carries no KV scales,
    TensorRT-LLM takes 1 for them, as its guides do for DeepSeek-R1 in FP8 blocks.
    """
    own = {model.checkpoint_quantization, "fp16"}
    return config.quantization not in own or config.kv_cache_dtype == "nvfp4"


def _cuda_graph_options(config: EngineConfig) -> dict[str, Any] | None:
    if config.cuda_graph_max_batch_size == 0:
        return None
    return {
        "enable_padding": config.cuda_graph_padding,
        "max_batch_size": min(config.cuda_graph_max_batch_size, config.max_batch_size),
    }


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


def _serve_script(config: EngineConfig, model: ModelSpec, num_servers: int) -> str:
    """Start each server; all end together."""
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
    each = config.num_gpus
    for server in range(num_servers):
        gpus = ",".join(str(server * each + i) for i in range(each))
        script += (
            f'CUDA_VISIBLE_DEVICES={shlex.quote(gpus)} trtllm-serve "$checkpoint" '
            f'--host "$host" --port {FIRST_PORT + server} --backend pytorch '
            '--config "$here/llm_api_options.yaml" &\npids+=($!)\n'
        )
    return script + 'wait -n "${pids[@]}"\n'


def _bench_script(
    config: EngineConfig, model: ModelSpec, workload: Workload, num_servers: int
) -> str:
    """One server under its share of the load, with the flags that agree with the YAML."""
    chunked = (
        "--enable_chunked_context"
        if config.enable_chunked_prefill
        else ("--disable_chunked_context")
    )
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
        "--scheduler_policy", _bench_policy(config),
        chunked,
        "--streaming",
        "--report_json", '"$here/report.json"',
        "--request_json", '"$here/requests.json"',
    ]  # fmt: skip
    if model.is_moe:
        arguments += ["--ep", str(config.moe_expert_parallel_size)]
    if workload.arrival.concurrency:
        clients = max(workload.arrival.concurrency // num_servers, 1)
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


def _bench_policy(config: EngineConfig) -> str:
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


def _dataset(model: ModelSpec, workload: Workload, seed: int) -> str:
    """Requests in trtllm-bench's form; token ids are random, lengths are the workload's."""
    rng = np.random.default_rng(seed)
    isl = workload.isl.sample(rng, DATASET_REQUESTS)
    osl = np.minimum(workload.osl.sample(rng, DATASET_REQUESTS), workload.max_output_tokens)
    lines: list[str] = []
    tokens = 0
    for number, (prompt, output) in enumerate(zip(isl.tolist(), osl.tolist(), strict=True)):
        tokens += prompt
        if lines and tokens > DATASET_TOKENS:
            break
        ids = rng.integers(10, model.vocab_size - 10, size=prompt).tolist()
        record = {"task_id": number, "input_ids": ids, "output_tokens": output}
        lines.append(json.dumps(record, separators=(",", ":")))
    return "\n".join(lines) + "\n"


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ProfileError(f"--out {folder}: not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "plan.json").is_file():
        raise ProfileError(
            f"--out {folder}: holds files that are not a plan's", hint="name a new or empty folder"
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    if path.suffix == ".sh":
        path.chmod(0o755)


def _refuse_line_breaks(text: str) -> None:
    if any(ord(character) < 32 for character in text):
        raise ConfigError(f"model name {text!r} has a control character in it")
