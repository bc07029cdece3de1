"""Reads knobs as people write them: `--set knob=value`, and TensorRT-LLM's own YAML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from cost_models.deployment import ALL_KNOBS, DEPLOYMENT_KNOBS, ROUTERS, Deployment
from cost_models.engine import KNOBS, EngineConfig
from cost_models.engine_rules import check_values
from cost_models.errors import ConfigError

TYPES: Mapping[str, str] = {
    "num_servers": "int",
    "router": "str",
    **{field.name: str(field.type) for field in fields(EngineConfig)},
}

OTHER_NAMES: Mapping[str, str] = {"num_replicas": "num_servers"}
"""Knobs under a name that people use too: each server runs one replica of the model."""

MOST_SERVERS = 4096

OPTION_PATHS: Mapping[str, str] = {
    "kv_cache_config.dtype": "kv_cache_dtype",
    "kv_cache_config.free_gpu_memory_fraction": "free_gpu_memory_fraction",
    "kv_cache_config.enable_block_reuse": "enable_block_reuse",
    "kv_cache_config.enable_partial_reuse": "enable_partial_reuse",
    "kv_cache_config.host_cache_size": "host_cache_size",
    "kv_cache_config.tokens_per_block": "tokens_per_block",
    "kv_cache_config.max_tokens": "kv_cache_max_tokens",
    "scheduler_config.capacity_scheduler_policy": "capacity_scheduler_policy",
    "scheduler_config.context_chunking_policy": "context_chunking_policy",
    "moe_config.backend": "moe_backend",
    "cuda_graph_config.max_batch_size": "cuda_graph_max_batch_size",
    "cuda_graph_config.enable_padding": "cuda_graph_padding",
    "speculative_config.decoding_type": "decoding_type",
    "speculative_config.max_draft_len": "max_draft_len",
    "speculative_config.num_nextn_predict_layers": "max_draft_len",
    "speculative_config.speculative_model": "speculative_model",
    "speculative_config.speculative_model_dir": "speculative_model",
    "speculative_config.max_matching_ngram_size": "max_matching_ngram_size",
    "torch_compile_config.enable_piecewise_cuda_graph": "enable_piecewise_cuda_graph",
}
"""TensorRT-LLM's nested options that are knobs of ours, by path."""

WITHOUT_EFFECT = (
    "backend", "print_iter_log", "enable_iter_perf_stats", "enable_iter_req_stats",
    "num_postprocess_workers", "trust_remote_code", "return_perf_metrics", "load_format",
    "tokenizer", "model", "revision", "max_beam_width", "skip_tokenizer_init",
    "attention_dp_config", "cache_transceiver_config", "gpus_per_node",
    "batch_wait_timeout_ms", "batch_wait_timeout_iters", "env_overrides", "attn_backend",
    "sampler_type", "guided_decoding_backend", "reasoning_parser", "perf_metrics_max_requests",
    "moe_config.max_num_tokens", "torch_compile_config",
    "kv_cache_config.copy_on_partial_reuse", "cuda_graph_config.batch_sizes",
    "speculative_config.eagle3_one_model", "speculative_config.mtp_eagle_one_model",
    "speculative_config.is_keep_all", "speculative_config.is_use_oldest",
    "speculative_config.is_public_pool", "speculative_config.allow_advanced_sampling",
)  # fmt: skip
"""Options that are accepted and do not change a prediction."""


MTP_DRAFT_LEN = 1
"""`num_nextn_predict_layers` where a YAML does not say."""


def parse_assignments(texts: Iterable[str], option: str) -> dict[str, str]:
    """Split `knob=value` texts.

    Raises:
        ConfigError: A text has no `=`, or a knob comes twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        knob, equals, value = text.partition("=")
        if not equals or not knob or not value:
            raise ConfigError(f"{option} {text!r} is not knob=value")
        if knob in pairs:
            raise ConfigError(f"{option} {knob} is given twice")
        pairs[knob] = value
    return pairs


def apply_settings(deployment: Deployment, settings: Mapping[str, str]) -> Deployment:
    """Return the deployment with knobs set from text.

    Raises:
        ConfigError: Unknown knob, or a value that it cannot take.
    """
    values = {known_knob(knob): parse_value(knob, text) for knob, text in settings.items()}
    changed = deployment.with_knobs(**values)
    _check_knobs(values)
    check_values(changed.config)
    return changed


def apply_engine_settings(config: EngineConfig, settings: Mapping[str, str]) -> EngineConfig:
    """Return an engine configuration with knobs set from text.

    Raises:
        ConfigError: Unknown knob, a value that it cannot take, or a knob of the deployment.
    """
    values = {known_knob(knob): parse_value(knob, text) for knob, text in settings.items()}
    for knob in DEPLOYMENT_KNOBS:
        if knob in values:
            raise ConfigError(
                f"{knob} is a knob of a deployment", hint="one server alone is measured here"
            )
    changed = replace(config, **values)
    check_values(changed)
    return changed


def _check_knobs(values: Mapping[str, Any]) -> None:
    """Refuse what no deployment takes.

    Raises:
        ConfigError: A number of servers or a router that there is not.
    """
    num_servers, router = values.get("num_servers", 1), values.get("router", ROUTERS[0])
    if not 1 <= num_servers <= MOST_SERVERS:
        raise ConfigError(f"num_servers={num_servers}", hint=f"accepted: 1 to {MOST_SERVERS}")
    if router not in ROUTERS:
        raise ConfigError(f"router={router!r}", hint=f"known: {', '.join(ROUTERS)}")


def parse_limits(pins: Mapping[str, str], limits: Mapping[str, str]) -> dict[str, tuple[Any, ...]]:
    """Return the values that `--pin` and `--limit` leave to each knob.

    Raises:
        ConfigError: Unknown knob, wrong value, or a knob both pinned and limited.
    """
    both = set(pins) & set(limits)
    if both:
        raise ConfigError(f"{sorted(both)[0]} is given by --pin and by --limit")
    allowed: dict[str, tuple[Any, ...]] = {
        known_knob(knob): (parse_value(knob, text),) for knob, text in pins.items()
    }
    for knob, text in limits.items():
        distinct = dict.fromkeys(parse_value(knob, part) for part in text.split(","))
        allowed[known_knob(knob)] = tuple(distinct)
    for knob, values in allowed.items():
        for value in values:
            _check_knobs({knob: value})
            if knob not in DEPLOYMENT_KNOBS:
                check_values(replace(EngineConfig(), **{knob: value}))
    return allowed


def known_knob(knob: str) -> str:
    """Return the knob's name.

    Raises:
        ConfigError: Unknown, with the nearest known ones.
    """
    knob = OTHER_NAMES.get(knob, knob)
    if knob in ALL_KNOBS:
        return knob
    close = get_close_matches(knob, ALL_KNOBS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(ALL_KNOBS)}"
    raise ConfigError(f"knob {knob!r} is unknown", hint=hint)


def parse_value(knob: str, text: str) -> Any:
    """Return a knob's value from text.

    Raises:
        ConfigError: The text is not of the knob's type.
    """
    kind = TYPES[known_knob(knob)]
    try:
        if kind == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[text.strip().lower()]
        if kind == "int":
            return int(text)
        if kind == "float":
            return _finite(text)
    except (KeyError, ValueError):
        names = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        raise ConfigError(f"{knob}={text!r}", hint=f"it must be {names[kind]}") from None
    return text.strip()


def config_from_options(
    options: Mapping[str, Any], base: EngineConfig
) -> tuple[EngineConfig, list[str]]:
    """Return the configuration of a TensorRT-LLM YAML, and the options that change nothing.

    Raises:
        ConfigError: An unknown option, or a value that it cannot take.
    """
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for path, value in flattened(options):
        knob = OPTION_PATHS.get(path, path if "." not in path else "")
        if knob in KNOBS and value is not None and knob not in ("quantization",):
            values[knob] = _typed(path, knob, value)
        elif path == "cuda_graph_config":
            values["cuda_graph_max_batch_size"] = 0
        elif path in WITHOUT_EFFECT or path.split(".")[0] in WITHOUT_EFFECT:
            ignored.append(path)
        elif value is not None:
            known = [*OPTION_PATHS, *KNOBS]
            close = get_close_matches(path, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(f"option {path!r} is not understood", hint=hint)
    sizes = (options.get("cuda_graph_config") or {}).get("batch_sizes")
    if sizes:
        values["cuda_graph_max_batch_size"] = max(sizes)
    if values.get("decoding_type") == "MTP":
        values.setdefault("max_draft_len", MTP_DRAFT_LEN)
    if values.get("kv_cache_dtype") == "auto":
        values["kv_cache_dtype"] = base.kv_cache_dtype
    config = replace(base, **values)
    check_values(config)
    return config, ignored


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _typed(path: str, knob: str, value: Any) -> Any:
    kind = TYPES[knob]
    wanted: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}
    wrong_bool = isinstance(value, bool) and kind != "bool"
    if wrong_bool or not isinstance(value, wanted[kind]):
        raise ConfigError(f"option {path}={value!r}", hint=f"it must be of type {kind}")
    return value


def flattened(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested options by path, `kv_cache_config.dtype` style."""
    for key, value in options.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{path}.")
        else:
            yield path, value
