"""TensorRT-LLM through `trtllm-bench`: no HTTP in between, the engine's own client.

Written against the documentation of version 1.2; not yet run against an installation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cost_models.engine import EngineConfig
from cost_models.errors import PlannerError
from engines.trtllm.scripts import bench_policy, chunked_flag
from executor.backend import (
    Availability,
    BenchmarkBackend,
    BenchmarkResult,
    Failure,
    Launch,
    ServerFailedError,
)
from executor.backends.launched import program
from executor.backends.trtllm import BACKENDS, TrtllmBackend, checkpoint, write_options
from executor.backends.trtllm_engine import uses_engine
from executor.backends.trtllm_reports import (
    iteration_summary,
    read_iteration_log,
    read_report,
    read_request_report,
)
from executor.load_generator import Prompt
from executor.process import ServerProcess
from executor.protocols import ClosedLoop, LoadProtocol, OpenLoop


class TrtllmBenchBackend(BenchmarkBackend):
    """Runs `trtllm-bench throughput`, or `latency` with option `mode=latency`.

    Options: `command` (another program than `trtllm-bench`), `mode`, and those of `trtllm`.
    """

    name = "trtllm-bench"
    engine = "trtllm"

    def __init__(self) -> None:
        self._serving = TrtllmBackend()
        self._serving.program = "trtllm-bench"

    def availability(self) -> Availability:
        """It needs the program and a package of version 1.0 or newer."""
        return self._serving.availability()

    def versions(self) -> dict[str, str]:
        """Return the versions that decide about speed."""
        return self._serving.versions()

    def engine_of(self, deployment: Launch) -> str:
        """Return what the serving backend calls it."""
        return self._serving.engine_of(deployment)

    def lacking(self, deployment: Launch) -> list[str]:
        """Return the options that the installed version does not know."""
        return self._serving.lacking(deployment)

    def prepare(self, deployment: Launch, *, limit_s: float) -> Launch:
        """Build what is not there: a checkpoint in the plan's precision, an engine of it."""
        return self._serving.prepare(deployment, limit_s=limit_s)

    def benchmark(
        self,
        deployment: Launch,
        prompts: Sequence[Prompt],
        *,
        protocol: LoadProtocol,
        limit_s: float,
    ) -> BenchmarkResult:
        """Write the data set, run the program and read its files."""
        if isinstance(protocol, OpenLoop):
            raise ServerFailedError(
                "trtllm-bench knows no arrival times",
                kind=Failure.NOT_AVAILABLE,
                hint="measure open loops with --backend trtllm",
            )
        files = BenchFiles(deployment.workdir)
        files.write_dataset(prompts)
        command = bench_command(deployment, files, protocol)
        process = ServerProcess(command, log_path=deployment.workdir / "trtllm-bench.log")
        try:
            status = process.wait_ended(limit_s=limit_s)
        finally:
            process.stop()
        if status:
            raise process.failure()
        try:
            return files.result(process.command_line)
        except PlannerError as error:
            raise ServerFailedError(
                error.message, kind=Failure.CRASHED, log_tail=process.log_tail()
            ) from error


class BenchFiles:
    """The files that go in and come out, in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dataset = folder / "dataset.jsonl"
        self.report = folder / "report.json"
        self.requests = folder / "requests.json"
        self.iterations = folder / "iterations.log"
        for path in (self.report, self.requests, self.iterations):
            path.unlink(missing_ok=True)

    def write_dataset(self, prompts: Sequence[Prompt]) -> None:
        """Write one request a line; a blank line would be an error."""
        lines = [
            json.dumps(
                {"task_id": n, "input_ids": list(prompt.token_ids), "output_tokens": prompt.osl}
            )
            for n, prompt in enumerate(prompts)
        ]
        self.dataset.write_text("\n".join(lines) + "\n")

    def result(self, command: str) -> BenchmarkResult:
        """Read what the program has written."""
        measured = read_report(self.report)
        if self.iterations.is_file():
            measured |= iteration_summary(read_iteration_log(self.iterations))
        return BenchmarkResult(
            requests=read_request_report(self.requests) if self.requests.is_file() else (),
            measured=measured,
            command=command,
            notes=("measured by trtllm-bench: no HTTP, percentiles without interpolation",),
        )


def bench_command(deployment: Launch, files: BenchFiles, protocol: LoadProtocol) -> list[str]:
    """Return the command line; the options file beats its flags, so both say the same."""
    config = deployment.config
    loaded, options = checkpoint(deployment), write_options(deployment)
    # --model takes a name only; what exists as a file or folder is refused.
    name = deployment.model.hub_name
    name = f"local/{deployment.model.label}" if Path(name).exists() else name
    command = [*program(deployment, "trtllm-bench"), "--model", name]
    if Path(loaded).is_dir():
        command += ["--model_path", loaded]
    concurrency = protocol.concurrency if isinstance(protocol, ClosedLoop) else -1
    common = [
        "--backend", deployment.options.get("backend", BACKENDS[0]),
        "--dataset", str(files.dataset),
        "--config", str(options),
        "--tp", str(config.tensor_parallel_size),
        "--pp", str(config.pipeline_parallel_size),
        "--max_seq_len", str(deployment.max_seq_len),
        "--kv_cache_free_gpu_mem_fraction", f"{config.free_gpu_memory_fraction:g}",
        "--concurrency", str(concurrency),
        "--report_json", str(files.report),
        "--iteration_log", str(files.iterations),
    ]  # fmt: skip
    if uses_engine(deployment):
        common += ["--engine_dir", deployment.options["engine_dir"]]
    if config.moe_expert_parallel_size > 1:
        common += ["--ep", str(config.moe_expert_parallel_size)]
    if deployment.options.get("mode") == "latency":
        return [*command, "latency", *common]
    return [*command, "throughput", *common, *_throughput_flags(config, files)]


def _throughput_flags(config: EngineConfig, files: BenchFiles) -> list[str]:
    return [
        "--max_batch_size", str(config.max_batch_size),
        "--max_num_tokens", str(config.max_num_tokens),
        "--scheduler_policy", bench_policy(config),
        chunked_flag(config),
        "--streaming",
        "--request_json", str(files.requests),
    ]  # fmt: skip
