"""The TensorRT engine backend of TensorRT-LLM 1.0 to 1.2: an engine is built, then served.

Written against the documentation of `trtllm-build`; not yet run against an installation.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cost_models.engine import EngineConfig
from executor.backend import Launch
from executor.backends.launched import model_argument, run_build, whole_folder

ENGINE_BACKEND = "tensorrt"
"""Value of option `backend` that asks for it."""

BUILDER = "trtllm-build"

LAST_VERSION = (1, 2)
"""Later versions have the PyTorch backend and _autodeploy only."""

WITHOUT_COUNTERPART = (
    "enable_attention_dp", "moe_expert_parallel_size", "stream_interval", "allreduce_strategy",
    "decoding_type",
)  # fmt: skip
"""Knobs that only the PyTorch backend has; their defaults ask nothing of an engine."""


def uses_engine(deployment: Launch) -> bool:
    """Return whether the engine backend is asked for."""
    return deployment.options.get("backend") == ENGINE_BACKEND


def engine_lacking(deployment: Launch, version: str) -> Iterator[str]:
    """Yield why this installation cannot build and serve an engine of a configuration."""
    option = f"option backend={ENGINE_BACKEND}"
    if version and _release(version) > LAST_VERSION:
        yield f"{option}: TensorRT-LLM {version} has no engine backend, 1.2 was the last with one"
        return
    if "engine_dir" not in deployment.options:
        if shutil.which(BUILDER) is None:
            yield f"{option}: {BUILDER} is not installed"
        if deployment.model.has_random_weights:
            yield f"{option}: an engine is built from a checkpoint, not from random weights"
    config, default = deployment.config, EngineConfig()
    for knob in WITHOUT_COUNTERPART:
        value = getattr(config, knob)
        if value != getattr(default, knob):
            yield f"{option}: {knob}={value}"


def with_engine(
    deployment: Launch, *, checkpoint: Path | None, version: str, limit_s: float
) -> Launch:
    """Return the deployment with the folder of its engine, built unless it was built before.

    Args:
        deployment: With the model that the tokenizer is taken from.
        checkpoint: In TensorRT-LLM's own format.
        version: Of TensorRT-LLM; engines of another one cannot be loaded.
        limit_s: Time to build.

    Raises:
        ServerFailedError: It cannot be built, or not in time.
    """
    command = [BUILDER, "--checkpoint_dir", str(checkpoint), *build_flags(deployment)]
    digest = hashlib.sha256(repr((command, version)).encode()).hexdigest()[:10]
    engine = deployment.workdir / f"{deployment.model.label}-engine-{digest}"
    if not (engine / "config.json").is_file():
        with whole_folder(engine) as unfinished:
            run_build(
                [*command, "--output_dir", str(unfinished)],
                what="building the engine",
                result=unfinished / "config.json",
                log_path=deployment.workdir / "build.log",
                limit_s=limit_s,
            )
    return replace(deployment, options={**deployment.options, "engine_dir": str(engine)})


def build_flags(deployment: Launch) -> list[str]:
    """Return the knobs of a deployment as flags of `trtllm-build`.

    Chunked prefill and block reuse need paged context attention; it costs nothing without them.
    """
    config = deployment.config
    found = [
        "--max_batch_size", str(config.max_batch_size),
        "--max_num_tokens", str(config.max_num_tokens),
        "--max_seq_len", str(deployment.max_seq_len),
        # By default prompts end at 1024 tokens.
        "--max_input_len", str(deployment.max_seq_len),
        "--tokens_per_block", str(config.tokens_per_block),
        "--kv_cache_type", "paged",
        "--use_paged_context_fmha", "enable",
        "--use_fp8_context_fmha", "enable" if config.kv_cache_dtype == "fp8" else "disable",
        "--gemm_plugin", "disable" if config.quantization in PLAIN_GEMM else "auto",
        "--multiple_profiles", "enable",
        "--workers", str(config.num_gpus),
    ]  # fmt: skip
    return found + deployment.options.get("build_arguments", "").split()


PLAIN_GEMM = ("fp8", "nvfp4")
"""Precisions whose GEMMs the documentation leaves to TensorRT, for all but the smallest batches."""


def engine_arguments(deployment: Launch) -> list[str]:
    """Return what `trtllm-serve` loads: the engine, and the tokenizer that it does not hold."""
    return [deployment.options["engine_dir"], "--tokenizer", model_argument(deployment, None)]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
