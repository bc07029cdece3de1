"""vLLM: `vllm serve` with the knobs that have a counterpart, facts from its log and metrics."""

from __future__ import annotations

import importlib.util
import json
import operator
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from cost_models.acceptance import stated_chances
from cost_models.engine import EngineConfig
from cost_models.engine_profile_io import load_engine
from cost_models.engine_rules import SpeculationRule
from executor.backend import Availability, Deployment, Server, ServingBackend
from executor.backends.launched import (
    GIB,
    LaunchedServer,
    LogPattern,
    json_option,
    labelled_values,
    launch,
    model_argument,
    program,
)
from executor.backends.random_model import write_model_folder
from executor.load_generator import Endpoint
from executor.machine import installed_versions
from executor.process import free_port, http_get

INSTALL = "pip install 'trtllm-planner[vllm]'"

QUANTIZATION_FLAGS: Mapping[str, Sequence[str]] = {
    "bf16": ("--dtype", "bfloat16"),
    "fp16": ("--dtype", "float16"),
    "fp8": ("--quantization", "fp8"),
    "fp8_dynamic": ("--quantization", "fp8"),
}
"""Flags of the precisions that vLLM makes itself; all others are read from the checkpoint."""

LOG_FACTS: Mapping[str, LogPattern] = {
    "kv_cache_tokens": (re.compile(r"GPU KV cache size: ([\d,]+) tokens"), 1.0),
    "weight_bytes_per_gpu": (re.compile(r"Model loading took ([\d.]+) ?GiB"), GIB),
    "kv_cache_bytes_per_gpu": (re.compile(r"Available KV cache memory: ([\d.]+) ?GiB"), GIB),
    "cuda_graph_bytes_per_gpu": (
        re.compile(r"Graph capturing finished in .* took ([\d.]+) ?GiB"),
        GIB,
    ),
    "activation_peak_bytes_per_gpu": (re.compile(r"([\d.]+) ?GiB for peak activation"), GIB),
    "non_torch_bytes_per_gpu": (re.compile(r"([\d.]+) ?GiB for non-torch memory"), GIB),
}
"""Lines of vLLM 0.25's log."""

COUNTERS: Mapping[str, str] = {
    "num_preemptions": "vllm:num_preemptions_total",
    "num_prefix_cache_hit_tokens": "vllm:prefix_cache_hits_total",
    "num_drafts": "vllm:spec_decode_num_drafts_total",
    "num_draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "num_accepted_draft_tokens": "vllm:spec_decode_num_accepted_tokens_total",
}

ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
"""Accepted draft tokens by `position`, from 0."""

SYNTHETIC = "synthetic_acceptance"
"""Option that replaces the comparison of drafts by chance."""

REQUEST_OPTIONS: Mapping[str, Any] = {"temperature": 0.0}
"""What requests to an engine that speculates say: drafts are compared with the likeliest token."""

KV_GAUGE = "vllm:kv_cache_usage_perc"
"""A fraction, whatever its name says."""

ENVIRONMENT: Mapping[str, str] = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "NO_COLOR": "1",
}


LOGGING: Mapping[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "vllm": {
            "class": "vllm.logging_utils.NewLineFormatter",
            "format": "%(levelname)s %(asctime)s [%(fileinfo)s:%(lineno)d] %(message)s",
        }
    },
    "handlers": {
        "vllm": {
            "class": "logging.StreamHandler",
            "formatter": "vllm",
            "level": "DEBUG",
            "stream": "ext://sys.stdout",
        }
    },
    "loggers": {
        "vllm": {"handlers": ["vllm"], "level": "INFO", "propagate": False},
        "vllm.v1.worker.gpu_worker": {"level": "DEBUG"},
    },
}
"""As vLLM's own, but for the worker: its memory account is printed at debug level, once."""


class VllmBackend(ServingBackend):
    """Starts `vllm serve`.

    Options: `command` (another program than `vllm`), `arguments` (further flags, split at spaces),
    `request` (JSON: further keys of each request), `speculative_config` (JSON, as vLLM takes it,
    over what the knobs say), `synthetic_acceptance` (rates as `0.8,0.7,0.6`: chances that draft
    token i is kept where all before it are, whatever it is; for drafts with random weights).
    """

    name = "vllm"
    engine = "vllm"

    def availability(self) -> Availability:
        """It needs the package, or the program of another environment."""
        if importlib.util.find_spec("vllm") is None and shutil.which("vllm") is None:
            return Availability(can_run=False, problem="vllm is not installed", install=INSTALL)
        return Availability(can_run=True, version=self.versions().get("vllm", ""))

    def versions(self) -> dict[str, str]:
        """Return the versions that decide about speed."""
        return installed_versions(("vllm", "torch", "transformers", "flashinfer-python"))

    def lacking(self, deployment: Deployment) -> list[str]:
        """Return the knobs that have no counterpart in vLLM."""
        config = deployment.config
        wanted = (
            (config.kv_cache_dtype not in ("bf16", "fp16", "fp8"), "kv_cache_dtype"),
            (config.moe_expert_parallel_size not in (1, config.tensor_parallel_size), _EXPERTS),
            (config.enable_attention_dp, "enable_attention_dp"),
            (config.speculates and config.decoding_type not in _schemes(), "decoding_type"),
        )
        return [f"{knob} ({config.kv_cache_dtype})" if knob == "kv_cache_dtype" else knob
                for is_lacking, knob in wanted if is_lacking]  # fmt: skip

    def start(self, deployment: Deployment, *, limit_s: float) -> Server:
        """Start it and wait for it; compilation and graph capture take one to two minutes."""
        folder = None
        if deployment.model.has_random_weights:
            folder = write_model_folder(deployment.model, deployment.workdir)
        model, port = model_argument(deployment, folder), free_port()
        draft = _draft_argument(deployment)
        command = [
            *program(deployment, "vllm"), "serve", model, "--port", str(port),
            *flags(deployment, draft=draft),
        ]  # fmt: skip
        environment = {**ENVIRONMENT, "VLLM_LOGGING_CONFIG_PATH": str(_write_logging(deployment))}
        if folder:
            environment["HF_HUB_OFFLINE"] = "1"
        process = launch(command, deployment, port=port, limit_s=limit_s, environment=environment)
        server = VllmServer(
            process,
            endpoint=_endpoint(deployment, port=port, model=model),
            log_facts=LOG_FACTS,
            counter_metrics=COUNTERS,
            kv_gauge=KV_GAUGE,
        )
        if SYNTHETIC in deployment.options:
            server.notes = ("synthetic acceptance",)
        return server


class VllmServer(LaunchedServer):
    """A running `vllm serve`."""

    def facts(self) -> dict[str, float]:
        """Return what the log says; an overridden number of blocks leaves memory unused."""
        facts = super().facts()
        if "--num-gpu-blocks-override" in self.command and "kv_cache_bytes_per_gpu" in facts:
            facts["kv_cache_available_bytes_per_gpu"] = facts.pop("kv_cache_bytes_per_gpu")
        return facts

    def counters(self) -> dict[str, float]:
        """Return its counters, accepted draft tokens by their position among them."""
        _, text = http_get(port=self.endpoint.port, path="/metrics")
        counted = labelled_values(text, ACCEPTED_AT, label="position")
        return super().counters() | {
            f"num_accepted_draft_tokens_at.{position}": value
            for position, value in sorted(counted.items())
        }


def flags(deployment: Deployment, *, draft: str = "") -> list[str]:
    """Return the knobs of a deployment as flags of `vllm serve`.

    Args:
        deployment: What is brought up.
        draft: Folder or name of the model that drafts.

    Raises:
        ConfigError: An option that cannot be read.
    """
    config, options = deployment.config, deployment.options
    found = [
        "--max-model-len", str(deployment.max_seq_len),
        "--gpu-memory-utilization", f"{config.gpu_memory_utilization:g}",
        "--max-num-seqs", str(config.max_batch_size),
        "--max-num-batched-tokens", str(config.max_num_tokens),
        "--block-size", str(config.tokens_per_block),
        "--tensor-parallel-size", str(config.tensor_parallel_size),
        "--pipeline-parallel-size", str(config.pipeline_parallel_size),
        "--enable-prefix-caching" if config.enable_block_reuse else "--no-enable-prefix-caching",
        *QUANTIZATION_FLAGS.get(config.quantization, ()),
        *_cache_flags(config),
    ]  # fmt: skip
    if not config.enable_chunked_prefill:
        found.append("--no-enable-chunked-prefill")
    if config.moe_expert_parallel_size > 1:
        found.append("--enable-expert-parallel")
    if config.cuda_graph_max_batch_size == 0:
        found.append("--enforce-eager")
    if deployment.model.has_random_weights:
        found += ["--load-format", "dummy"]
    speculative = speculative_config(config, options, draft=draft)
    if speculative:
        found += ["--speculative-config", json.dumps(speculative)]
    return found + options.get("arguments", "").split()


def speculative_config(
    config: EngineConfig, options: Mapping[str, str], *, draft: str = ""
) -> dict[str, Any]:
    """Return what `--speculative-config` says; empty where nothing drafts.

    Raises:
        ConfigError: An option that cannot be read, or rates that are not as many as the drafts.
    """
    found: dict[str, Any] = {}
    if config.speculates:
        rule = _schemes()[config.decoding_type]
        found = {"method": rule.name, rule.length_option: config.max_draft_len}
        if config.decoding_type == "NGram":
            size = config.max_matching_ngram_size
            found |= {"prompt_lookup_max": size, "prompt_lookup_min": 1}
        if rule.needs_model:
            found["model"] = draft
    found |= json_option(options, "speculative_config")
    if SYNTHETIC in options:
        found |= _synthetic(options[SYNTHETIC], config.max_draft_len)
    return found


def _synthetic(text: str, max_draft_len: int) -> dict[str, Any]:
    """Return the keys that make vLLM keep draft tokens by chance; it takes unconditional rates."""
    chances = stated_chances(text, max_draft_len)
    rates = [round(rate, 6) for rate in accumulate(chances, operator.mul)]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def _schemes() -> Mapping[str, SpeculationRule]:
    return load_engine("vllm").speculation


def _draft_argument(deployment: Deployment) -> str:
    """Return what vLLM loads as the draft; of a model without weights, a folder like the target's.

    vLLM loads the draft as it loads the target, so with dummy weights where that has them.
    """
    draft = deployment.draft
    if draft is None:
        return deployment.config.speculative_model
    folder = None
    if deployment.model.has_random_weights:
        folder = write_model_folder(draft, deployment.workdir)
    return str(folder or draft.folder or draft.hub_name)


def _endpoint(deployment: Deployment, *, port: int, model: str) -> Endpoint:
    endpoint = Endpoint(port=port, model=model)
    sampling = REQUEST_OPTIONS if "--speculative-config" in flags(deployment) else {}
    asked = json_option(deployment.options, "request")
    return replace(endpoint, options={**endpoint.options, **sampling, **asked})


def _write_logging(deployment: Deployment) -> Path:
    """Write the logging configuration under which the worker tells its memory account."""
    deployment.workdir.mkdir(parents=True, exist_ok=True)
    path = deployment.workdir / "vllm_logging.json"
    path.write_text(json.dumps(LOGGING))
    return path


def _cache_flags(config: EngineConfig) -> list[str]:
    found = ["--kv-cache-dtype", "fp8"] if config.kv_cache_dtype == "fp8" else []
    if config.kv_cache_max_tokens:
        blocks = config.kv_cache_max_tokens // config.tokens_per_block
        found += ["--num-gpu-blocks-override", str(blocks)]
    return found


_EXPERTS = "moe_expert_parallel_size between 1 and tensor_parallel_size"
