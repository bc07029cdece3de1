"""TensorRT-LLM: `trtllm-serve` with the options file that the planner writes.

Written against the documentation and the option schema of version 1.2; not yet run against an
installation.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from executor.backend import (
    Availability,
    Deployment,
    Failure,
    Server,
    ServerFailedError,
    ServingBackend,
)
from executor.backends.launched import (
    GIB,
    LaunchedServer,
    LogPattern,
    launch,
    model_argument,
    program,
)
from executor.backends.random_model import write_model_folder
from executor.load_generator import Endpoint
from executor.machine import installed_versions
from executor.process import ServerProcess, free_port

INSTALL = "pip install 'trtllm-planner[trtllm]' (or use the container of TensorRT-LLM)"

OLDEST = 1

LOG_FACTS: Mapping[str, LogPattern] = {
    "kv_cache_tokens": (re.compile(r"for max tokens in paged KV cache \((\d+)\)"), 1.0),
    "kv_cache_bytes_per_gpu": (
        re.compile(r"Allocated ([\d.]+) GiB for max tokens in paged KV cache"),
        GIB,
    ),
    "activation_peak_bytes_per_gpu": (
        re.compile(r"Peak memory during memory usage profiling[^:]*: ([\d.]+) GiB"),
        GIB,
    ),
}
"""Lines of the log of 1.2; the first profiling run allocates a small cache, the last one counts."""

SCHEMA_PROGRAM = (
    "import json\n"
    "from tensorrt_llm.llmapi.llm_args import TorchLlmArgs\n"
    "print('schema: ' + json.dumps(TorchLlmArgs.model_json_schema()))\n"
)

SCHEMA_LIMIT_S = 180.0
"""Importing TensorRT-LLM takes up to a minute."""


class TrtllmBackend(ServingBackend):
    """Starts `trtllm-serve`.

    Options: `command` (another program than `trtllm-serve`), `checkpoint` (a quantized folder),
    `backend` (pytorch or _autodeploy).
    """

    name = "trtllm"
    engine = "trtllm"
    program = "trtllm-serve"

    def availability(self) -> Availability:
        """It needs the program and a package of version 1.0 or newer."""
        version = self.versions().get("tensorrt_llm", "")
        if shutil.which(self.program) is None:
            return Availability(
                can_run=False, problem=f"{self.program} is not installed", install=INSTALL
            )
        if version and int(version.split(".")[0]) < OLDEST:
            problem = f"TensorRT-LLM {version} is older than 1.0"
            return Availability(can_run=False, version=version, problem=problem, install=INSTALL)
        return Availability(can_run=True, version=version)

    def versions(self) -> dict[str, str]:
        """Return the versions that decide about speed."""
        return installed_versions(("tensorrt_llm", "tensorrt", "torch", "transformers"))

    def lacking(self, deployment: Deployment) -> list[str]:
        """Return the options that the installed version does not know."""
        if deployment.config.num_replicas != 1:
            return ["num_replicas above 1: measure one replica"]
        schema = installed_schema()
        return list(unknown_options(deployment.engine_options, schema, schema)) if schema else []

    def prepare(self, deployment: Deployment, *, limit_s: float) -> Deployment:
        """Quantize the checkpoint where the plan asks for one that is not published."""
        return prepared(deployment, limit_s=limit_s)

    def start(self, deployment: Deployment, *, limit_s: float) -> Server:
        """Start it and wait for it."""
        options, model = write_options(deployment), checkpoint(deployment)
        port = free_port()
        command = [
            *program(deployment, self.program), model, "--host", "127.0.0.1", "--port", str(port),
            "--backend", deployment.options.get("backend", "pytorch"), "--config", str(options),
        ]  # fmt: skip
        process = launch(command, deployment, port=port, limit_s=limit_s)
        return LaunchedServer(
            process, endpoint=Endpoint(port=port, model=model), log_facts=LOG_FACTS
        )


def installed_schema() -> dict[str, Any]:
    """Return the JSON schema of the installed version's options; empty where it tells none."""
    try:
        answer = subprocess.run(  # noqa: S603  a fixed program
            [sys.executable, "-c", SCHEMA_PROGRAM],
            capture_output=True,
            text=True,
            timeout=SCHEMA_LIMIT_S,
            check=True,
        ).stdout
        lines = [line for line in answer.splitlines() if line.startswith("schema: ")]
        schema: dict[str, Any] = json.loads(lines[-1].removeprefix("schema: "))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return schema


def unknown_options(
    options: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Yield the paths of options that a JSON schema does not have, and values it excludes."""
    known = schema.get("properties")
    if known is None:
        return
    for name, value in options.items():
        if name not in known:
            yield f"{prefix}{name}"
            continue
        for part in _alternatives(known[name], root):
            if isinstance(value, Mapping) and "properties" in part:
                yield from unknown_options(value, part, root, f"{prefix}{name}.")
        allowed = [v for part in _alternatives(known[name], root) for v in part.get("enum", ())]
        if allowed and isinstance(value, str) and value not in allowed:
            yield f"{prefix}{name}={value}"


def prepared(deployment: Deployment, *, limit_s: float) -> Deployment:
    """Run the deployment's build script, unless a checkpoint is given or made before.

    Raises:
        ServerFailedError: The script fails or takes too long.
    """
    given = deployment.options.get("checkpoint", "")
    if given or not deployment.build_script or deployment.model.has_random_weights:
        folder = Path(given) if given else deployment.model.folder
        return replace(deployment, model=replace(deployment.model, folder=folder))
    config = deployment.config
    label = deployment.model.label
    target = deployment.workdir / f"{label}-{config.quantization}-kv-{config.kv_cache_dtype}"
    if not (target / "config.json").is_file():
        _build(deployment, target, limit_s)
    return replace(deployment, model=replace(deployment.model, folder=target))


def write_options(deployment: Deployment) -> Path:
    """Write the options file and return it; it beats every flag of the command line."""
    import yaml  # noqa: PLC0415  only when files are written

    options = dict(deployment.engine_options)
    if deployment.model.has_random_weights:
        options["load_format"] = "DUMMY"
    deployment.workdir.mkdir(parents=True, exist_ok=True)
    path = deployment.workdir / "llm_api_options.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


def checkpoint(deployment: Deployment) -> str:
    """Return what the engine loads: a folder, or a name on the hub."""
    folder = None
    if deployment.model.has_random_weights:
        folder = write_model_folder(deployment.model, deployment.workdir)
    return model_argument(deployment, folder)


def _build(deployment: Deployment, target: Path, limit_s: float) -> None:
    deployment.workdir.mkdir(parents=True, exist_ok=True)
    script = deployment.workdir / "quantize.sh"
    script.write_text(deployment.build_script)
    process = ServerProcess(
        ["bash", str(script)],
        log_path=deployment.workdir / "quantize.log",
        environment={"CHECKPOINT": str(target)},
    )
    try:
        status = process.wait_ended(limit_s=limit_s)
    except ServerFailedError as error:
        raise ServerFailedError(
            f"quantizing {error.message}", kind=Failure.PREPARE_FAILED, log_tail=error.log_tail
        ) from error
    finally:
        process.stop()
    if status or not (target / "config.json").is_file():
        shutil.rmtree(target, ignore_errors=True)
        raise ServerFailedError(
            f"quantizing ended with status {status} and no checkpoint in {target}",
            kind=Failure.PREPARE_FAILED,
            log_tail=process.log_tail(),
        )


def _alternatives(
    schema: Mapping[str, Any], root: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    """Yield what a property may be, with references followed."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        yield from _alternatives(root.get("$defs", {}).get(name, {}), root)
    elif "anyOf" in schema or "allOf" in schema or "oneOf" in schema:
        for key in ("anyOf", "allOf", "oneOf"):
            for part in schema.get(key, ()):
                yield from _alternatives(part, root)
    else:
        yield schema
