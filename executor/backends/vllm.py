"""vLLM: `vllm serve`, facts from its log and metrics."""

from __future__ import annotations

import importlib.util
import json
import operator
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from cost_models.acceptance import stated_chances
from cost_models.units import GIB
from engines.registry import find_engine
from engines.vllm.flags import POLICIES, as_flags, serve_options
from executor.backend import Availability, Launch, Server, ServingBackend
from executor.backends.launched import (
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

    def lacking(self, deployment: Launch) -> list[str]:
        """Return the knobs that vLLM cannot be told."""
        config, rules = deployment.config, find_engine(self.engine).rules
        wanted = (
            (
                config.kv_cache_dtype not in rules.kv_cache_dtypes,
                f"kv_cache_dtype ({config.kv_cache_dtype})",
            ),
            (config.queue_order not in POLICIES, f"queue_order ({config.queue_order})"),
            (
                config.speculates and config.decoding_type not in rules.speculation,
                "decoding_type",
            ),
        )
        lacking = [words for is_lacking, words in wanted if is_lacking]
        return lacking + [str(violation) for violation in rules.unsent(config)]

    def start(self, deployment: Launch, *, limit_s: float) -> Server:
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


def flags(deployment: Launch, *, draft: str = "") -> list[str]:
    """Return the flags of `vllm serve` for a deployment.

    Args:
        deployment: What is brought up.
        draft: Folder or name of the model that drafts.

    Raises:
        ConfigError: An option that cannot be read.
    """
    said = serve_options(deployment.config, max_seq_len=deployment.max_seq_len)
    drafting = _speculative_options(deployment, said.pop("speculative-config", {}), draft)
    if deployment.model.has_random_weights:
        said["load-format"] = "dummy"
    if drafting:
        said["speculative-config"] = drafting
    return as_flags(said) + deployment.options.get("arguments", "").split()


def _speculative_options(deployment: Launch, said: Mapping[str, Any], draft: str) -> dict[str, Any]:
    """Return what `--speculative-config` says; empty where nothing drafts.

    Raises:
        ConfigError: An option that cannot be read, or rates that are not as many as the drafts.
    """
    found = {**said, **({"model": draft} if draft and "model" in said else {})}
    found |= json_option(deployment.options, "speculative_config")
    if SYNTHETIC in deployment.options:
        found |= _synthetic(deployment.options[SYNTHETIC], deployment.config.max_draft_len)
    return found


def _synthetic(text: str, max_draft_len: int) -> dict[str, Any]:
    """Return the keys that make vLLM keep draft tokens by chance; it takes unconditional rates."""
    chances = stated_chances(text, max_draft_len)
    rates = [round(rate, 6) for rate in accumulate(chances, operator.mul)]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def _draft_argument(deployment: Launch) -> str:
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


def _endpoint(deployment: Launch, *, port: int, model: str) -> Endpoint:
    endpoint = Endpoint(port=port, model=model)
    sampling = REQUEST_OPTIONS if "--speculative-config" in flags(deployment) else {}
    asked = json_option(deployment.options, "request")
    return replace(endpoint, options={**endpoint.options, **sampling, **asked})


def _write_logging(deployment: Launch) -> Path:
    """Write the logging configuration under which the worker tells its memory account."""
    deployment.workdir.mkdir(parents=True, exist_ok=True)
    path = deployment.workdir / "vllm_logging.json"
    path.write_text(json.dumps(LOGGING))
    return path
