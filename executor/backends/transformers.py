"""transformers' continuous batching, in a small server of our own: CUDA, or CPU for a try."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

from executor.backend import Availability, Launch, Server, ServingBackend
from executor.backends.launched import LaunchedServer, launch
from executor.backends.random_model import write_config_folder
from executor.load_generator import Endpoint
from executor.machine import installed_versions
from executor.process import free_port

INSTALL = "pip install 'trtllm-planner[transformers]'"

OLDEST = (5, 17)
"""The first version that this has been run with."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

FACTS_PREFIX = "planner-facts: "
"""Begins the line of the server's log that holds its facts as JSON."""


class TransformersBackend(ServingBackend):
    """Runs a local model folder, or random weights from a config.json.

    Options: `device` (cuda or cpu), `attention` (an attention implementation of transformers),
    `scheduler` (fifo or prefill_first), `cuda_graphs` (on or off; else transformers decides).
    """

    name = "transformers"
    engine = "transformers"

    def availability(self) -> Availability:
        """It needs torch and a recent transformers."""
        missing = [name for name in ("torch", "transformers") if not _is_installed(name)]
        if missing:
            problem = f"{' and '.join(missing)} not installed"
            return Availability(can_run=False, problem=problem, install=INSTALL)
        version = self.versions()["transformers"]
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        return Availability(
            can_run=numbers >= OLDEST,
            version=version,
            problem="" if numbers >= OLDEST else f"transformers {version} is older than 5.17",
            install="" if numbers >= OLDEST else INSTALL,
        )

    def versions(self) -> dict[str, str]:
        """Return the versions that decide about speed."""
        return installed_versions(("torch", "transformers", "flash-attn", "kernels", "triton"))

    def lacking(self, deployment: Launch) -> list[str]:
        """Return the knobs that have no counterpart."""
        config = deployment.config
        found = []
        if config.quantization not in DTYPES:
            found.append(f"quantization={config.quantization}")
        if config.kv_cache_dtype not in (config.quantization, "auto"):
            found.append(f"kv_cache_dtype={config.kv_cache_dtype} with {config.quantization}")
        if config.num_gpus != 1:
            found.append("more than one GPU")
        if config.speculates:
            found.append("decoding_type")
        if deployment.model.folder is None and not deployment.model.has_random_weights:
            found.append(f"{deployment.model.hub_name} by name: give a folder, or random weights")
        return found

    def start(self, deployment: Launch, *, limit_s: float) -> Server:
        """Start our server process and wait until the model is warm."""
        port = free_port()
        settings = server_settings(deployment, port)
        path = deployment.workdir / f"transformers-{port}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
        command = [sys.executable, "-m", "executor.backends.transformers_server", str(path)]
        process = launch(command, deployment, port=port, limit_s=limit_s)
        return TransformersServer(
            process, endpoint=Endpoint(port=port, model=deployment.model.name), log_facts={}
        )


class TransformersServer(LaunchedServer):
    """A running server of `transformers_server`."""

    def facts(self) -> dict[str, float]:
        """Return what the server says of its cache and its weights."""
        for line in self._process.log_text().splitlines():
            if line.startswith(FACTS_PREFIX):
                facts: dict[str, float] = json.loads(line.removeprefix(FACTS_PREFIX))
                return facts
        return {}


def server_settings(deployment: Launch, port: int) -> dict[str, Any]:
    """Return what the server process is told, with the knobs in transformers' names."""
    config, model, options = deployment.config, deployment.model, deployment.options
    folder = model.folder
    if model.has_random_weights:
        folder = write_config_folder(model, deployment.workdir)
    batching: dict[str, Any] = {
        "max_batch_tokens": config.max_num_tokens,
        "max_requests_per_batch": config.max_batch_size,
        "max_memory_percent": config.free_gpu_memory_fraction,
        "allow_block_sharing": config.enable_block_reuse,
        "max_blocks_per_request": _even(-(-deployment.max_seq_len // config.tokens_per_block) + 1),
        "scheduler_type": options.get("scheduler", "fifo"),
        "seed": 0,
    }
    if config.kv_cache_max_tokens:
        batching["num_blocks"] = config.kv_cache_max_tokens // config.tokens_per_block
    if "cuda_graphs" in options or config.cuda_graph_max_batch_size == 0:
        batching["use_cuda_graph"] = options.get("cuda_graphs") == "on"
    return {
        "port": port,
        "model": model.name,
        "folder": str(folder),
        "has_random_weights": model.has_random_weights,
        "dtype": DTYPES[config.quantization],
        "device": options.get("device", ""),
        "attention": options.get("attention", ""),
        "max_seq_len": deployment.max_seq_len,
        "tokens_per_block": config.tokens_per_block,
        "cpu_num_blocks": cpu_num_blocks(deployment),
        "continuous_batching": batching,
    }


def cpu_num_blocks(deployment: Launch) -> int:
    """Return a cache for a CPU: left alone, transformers takes most of the host's memory."""
    config = deployment.config
    blocks_per_sequence = -(-deployment.max_seq_len // config.tokens_per_block) + 1
    return blocks_per_sequence * min(config.max_batch_size, 16)


def _even(number: int) -> int:
    return number + number % 2


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
