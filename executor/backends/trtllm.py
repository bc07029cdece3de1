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

from cost_models.units import GIB
from engines.registry import find_engine
from executor.backend import Availability, Launch, Server, ServingBackend
from executor.backends.launched import (
    LaunchedServer,
    LogPattern,
    launch,
    model_argument,
    program,
    run_build,
    whole_folder,
)
from executor.backends.random_model import write_model_folder
from executor.backends.trtllm_engine import (
    ENGINE_BACKEND,
    engine_arguments,
    engine_lacking,
    uses_engine,
    with_engine,
)
from executor.deadline import Deadline
from executor.load_generator import Endpoint
from executor.machine import installed_versions
from executor.process import free_port

INSTALL = "pip install 'trtllm-planner[trtllm]' (or use the container of TensorRT-LLM)"

OLDEST = 1

OPTION_CLASSES: Mapping[str, str] = {
    "pytorch": "TorchLlmArgs",
    "_autodeploy": "TorchLlmArgs",
    ENGINE_BACKEND: "TrtLlmArgs",
}
"""The class of TensorRT-LLM that holds the options of each backend."""

BACKENDS = tuple(OPTION_CLASSES)
"""Values of option `backend`, the default first."""

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
    "import json, sys\n"
    "from tensorrt_llm.llmapi import llm_args\n"
    "print('schema: ' + json.dumps(getattr(llm_args, sys.argv[1]).model_json_schema()))\n"
)

SCHEMA_LIMIT_S = 180.0
"""Importing TensorRT-LLM takes up to a minute."""


class TrtllmBackend(ServingBackend):
    """Starts `trtllm-serve`.

    Options: `command` (another program than `trtllm-serve`), `checkpoint` (a quantized folder),
    `backend` (pytorch, _autodeploy or tensorrt); for the last, which serves an engine:
    `build_arguments` (further flags of `trtllm-build`) and `engine_dir` (one built before).
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

    def engine_of(self, deployment: Launch) -> str:
        """Keep runs of a TensorRT engine apart: constants of the PyTorch backend are not theirs."""
        engine = super().engine_of(deployment)
        return f"{engine}-{ENGINE_BACKEND}" if uses_engine(deployment) else engine

    def lacking(self, deployment: Launch) -> list[str]:
        """Return the options that the installed version does not know."""
        unsent = find_engine(self.engine).rules.unsent(deployment.config)
        if unsent:
            return [str(violation) for violation in unsent]
        asked = deployment.options.get("backend", BACKENDS[0])
        if asked not in BACKENDS:
            return [f"option backend={asked}: one of {', '.join(BACKENDS)}"]
        if uses_engine(deployment):
            found = list(engine_lacking(deployment, self.versions().get("tensorrt_llm", "")))
            if found:
                return found
        schema = installed_schema(OPTION_CLASSES[asked])
        return list(unknown_options(deployment.engine_options, schema, schema)) if schema else []

    def prepare(self, deployment: Launch, *, limit_s: float) -> Launch:
        """Build what is not there: a checkpoint in the plan's precision, an engine of it."""
        if "engine_dir" in deployment.options:
            return deployment
        deadline = Deadline.after(limit_s)
        ready = prepared(deployment, limit_s=limit_s)
        if not uses_engine(deployment):
            return ready
        return with_engine(
            deployment,
            checkpoint=ready.model.folder,
            version=self.versions().get("tensorrt_llm", ""),
            limit_s=deadline.within(limit_s),
        )

    def start(self, deployment: Launch, *, limit_s: float) -> Server:
        """Start it and wait for it."""
        options, port = write_options(deployment), free_port()
        is_engine = uses_engine(deployment)
        loaded = engine_arguments(deployment) if is_engine else [checkpoint(deployment)]
        command = [
            *program(deployment, self.program), *loaded, "--host", "127.0.0.1",
            "--port", str(port), "--backend", deployment.options.get("backend", BACKENDS[0]),
            "--config", str(options),
        ]  # fmt: skip
        process = launch(command, deployment, port=port, limit_s=limit_s)
        return LaunchedServer(
            process, endpoint=Endpoint(port=port, model=loaded[0]), log_facts=LOG_FACTS
        )


def installed_schema(options_class: str = "TorchLlmArgs") -> dict[str, Any]:
    """Return the JSON schema of the installed version's options; empty where it tells none."""
    try:
        answer = subprocess.run(  # noqa: S603  a fixed program
            [sys.executable, "-c", SCHEMA_PROGRAM, options_class],
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


def prepared(deployment: Launch, *, limit_s: float) -> Launch:
    """Run the deployment's build script, unless a checkpoint is given or made before.

    Raises:
        ServerFailedError: The script fails or takes too long.
    """
    given = deployment.options.get("checkpoint", "")
    if given or not deployment.build_script or deployment.model.has_random_weights:
        folder = Path(given) if given else deployment.model.folder
        return replace(deployment, model=replace(deployment.model, folder=folder))
    target = deployment.workdir / _checkpoint_name(deployment)
    if not (target / "config.json").is_file():
        script = deployment.workdir / "quantize.sh"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(deployment.build_script)
        with whole_folder(target) as unfinished:
            run_build(
                ["bash", str(script)],
                what="quantizing",
                result=unfinished / "config.json",
                log_path=deployment.workdir / "quantize.log",
                limit_s=limit_s,
                environment={
                    "CHECKPOINT": str(unfinished),
                    "SOURCE": model_argument(deployment, None),
                },
            )
    return replace(deployment, model=replace(deployment.model, folder=target))


def write_options(deployment: Launch) -> Path:
    """Write the options file and return it; it beats every flag of the command line."""
    import yaml  # noqa: PLC0415  only when files are written

    options = dict(deployment.engine_options)
    if deployment.model.has_random_weights:
        options["load_format"] = "DUMMY"
    deployment.workdir.mkdir(parents=True, exist_ok=True)
    path = deployment.workdir / "llm_api_options.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


def checkpoint(deployment: Launch) -> str:
    """Return what the engine loads: a folder, or a name on the hub."""
    folder = None
    if deployment.model.has_random_weights:
        folder = write_model_folder(deployment.model, deployment.workdir)
    return model_argument(deployment, folder)


def _checkpoint_name(deployment: Launch) -> str:
    """Return what a checkpoint's folder is called; an engine's is split over its GPUs."""
    config = deployment.config
    name = f"{deployment.model.label}-{config.quantization}-kv-{config.kv_cache_dtype}"
    if uses_engine(deployment):
        split = f"tp{config.tensor_parallel_size}-pp{config.pipeline_parallel_size}"
        return f"{name}-tensorrt-{split}"
    return name


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
