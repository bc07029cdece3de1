"""The TensorRT engine backend: what is asked of trtllm-build, built once, never left half."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.engine import EngineConfig
from executor.backend import Failure, Launch, Server, ServerFailedError, check_can_run
from executor.backends.trtllm import TrtllmBackend
from executor.backends.trtllm_bench import TrtllmBenchBackend
from executor.backends.trtllm_engine import build_flags
from executor.protocols import ClosedLoop
from tests.executor.conftest import STAND_INS, TINY_MODEL
from tests.executor.test_backends import PROMPTS, ServingContract, marked_processes

OPTIONS: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 128,
    "kv_cache_config": {"free_gpu_memory_fraction": 0.8},
    "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
    "extended_runtime_perf_knob_config": {"cuda_graph_mode": True},
}

SCRIPT = (
    'python3 "$TENSORRT_LLM/examples/quantization/quantize.py" --model_dir "$SOURCE" '
    '--qformat int8_sq --output_dir "$CHECKPOINT"\n'
)


@pytest.fixture(autouse=True)
def _installed(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "packages"))
    monkeypatch.setenv("TENSORRT_LLM", str(STAND_INS))


@pytest.fixture(name="wanted")
def engine_deployment(deployment: Launch) -> Launch:
    return replace(
        deployment,
        model=replace(TINY_MODEL, has_random_weights=False, folder=Path("/models/tiny")),
        engine_options=OPTIONS,
        build_script=SCRIPT,
        options={"backend": "tensorrt"},
    )


def installed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(TrtllmBackend, "versions", lambda _self: {"tensorrt_llm": version})


class TestTrtllmEngine(ServingContract):
    backend = TrtllmBackend()

    @pytest.fixture
    def prepared(self, wanted: Launch) -> Launch:
        return wanted

    def check_serving(self, server: Server) -> None:
        super().check_serving(server)
        assert " --tokenizer /models/tiny " in server.command
        assert " --backend tensorrt " in server.command

    def test_it_is_built_once_for_each_configuration_and_version(
        self, prepared: Launch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def engine_of(deployment: Launch) -> Path:
            return Path(self.backend.prepare(deployment, limit_s=30).options["engine_dir"])

        first = engine_of(prepared)
        made = (first / "config.json").stat().st_mtime_ns
        assert engine_of(prepared) == first
        assert (first / "config.json").stat().st_mtime_ns == made
        larger = replace(prepared, config=replace(prepared.config, max_num_tokens=256))
        plain = {"backend": "tensorrt", "build_arguments": "--gemm_plugin disable"}
        assert engine_of(larger) != first
        assert engine_of(replace(prepared, options=plain)) != first
        installed(monkeypatch, "1.1.0")
        assert engine_of(prepared) != first
        checkpoint = json.loads((first / "config.json").read_text())["pretrained_config"]
        assert checkpoint["source"] == "/models/tiny"
        assert checkpoint["quantization"]["qformat"] == "int8_sq"

    def test_an_engine_of_the_person_is_taken(self, prepared: Launch) -> None:
        built = self.backend.prepare(prepared, limit_s=30).options["engine_dir"]
        mine = {"backend": "tensorrt", "engine_dir": built}
        given = replace(prepared, options=mine, build_script="exit 1")
        assert self.backend.prepare(given, limit_s=1) == given

    @pytest.mark.parametrize("failure", ["builds_for_ever", "no_memory_to_build"])
    def test_a_build_that_fails_leaves_no_half_engine(
        self, prepared: Launch, monkeypatch: pytest.MonkeyPatch, failure: str
    ) -> None:
        before = marked_processes()
        monkeypatch.setenv("STAND_IN_FAILURE", failure)
        with pytest.raises(ServerFailedError, match="building the engine") as caught:
            self.backend.prepare(prepared, limit_s=3)
        assert caught.value.kind is Failure.PREPARE_FAILED
        assert ("OutOfMemory" in caught.value.log_tail) is (failure == "no_memory_to_build")
        assert marked_processes() == before
        assert [path.name for path in prepared.workdir.iterdir() if path.is_dir()] == [
            "tiny-bf16-kv-bf16-tensorrt-tp1-pp1"
        ]

    def test_a_build_killed_half_way_is_made_anew(self, prepared: Launch, tmp_path: Path) -> None:
        program = (
            "from executor.backends.launched import whole_folder\n"
            "import pathlib, sys, time\n"
            "with whole_folder(pathlib.Path(sys.argv[1])) as unfinished:\n"
            "    unfinished.mkdir(); (unfinished / 'rank0.engine').touch()\n"
            "    print('half', flush=True); time.sleep(600)\n"
        )
        engine = Path(self.backend.prepare(prepared, limit_s=30).options["engine_dir"])
        engine.rename(tmp_path / "away")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with subprocess.Popen(
            [sys.executable, "-c", program, str(engine)],
            stdout=subprocess.PIPE,
            env=environment,
        ) as half:
            assert half.stdout is not None
            assert half.stdout.readline()
            half.send_signal(signal.SIGKILL)
        assert not engine.exists()
        self.backend.prepare(prepared, limit_s=30)
        assert (engine / "config.json").is_file()
        assert sum(path.is_dir() for path in engine.parent.iterdir()) == 2  # and the checkpoint


@pytest.mark.parametrize(
    ("version", "changes", "said"),
    [
        ("1.3.0rc2", {}, "option backend=tensorrt: TensorRT-LLM 1.3.0rc2 has no engine backend"),
        ("1.2.1", {"enable_attention_dp": True}, "enable_attention_dp=True"),
        ("1.2.1", {"stream_interval": 4}, "option backend=tensorrt: stream_interval=4"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_starts(
    wanted: Launch,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    installed(monkeypatch, version)
    wanted = replace(wanted, config=replace(wanted.config, **changes))
    with pytest.raises(ServerFailedError) as caught:
        check_can_run(TrtllmBackend(), wanted)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.kind is Failure.NOT_AVAILABLE


def test_a_missing_builder_random_weights_and_unknown_backends_are_named(
    wanted: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "trtllm-build is not installed" not in TrtllmBackend().lacking(wanted)
    random = replace(wanted, model=TINY_MODEL)
    assert "not from random weights" in TrtllmBackend().lacking(random)[0]
    unknown = replace(wanted, options={"backend": "trt"})
    assert "option backend=trt: one of pytorch, _autodeploy, tensorrt" in (
        TrtllmBackend().lacking(unknown)
    )
    (tmp_path / "trtllm-serve").symlink_to(STAND_INS / "trtllm-serve")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert TrtllmBackend().lacking(wanted) == [
        "option backend=tensorrt: trtllm-build is not installed"
    ]


def test_options_of_the_pytorch_backend_are_refused(wanted: Launch) -> None:
    options = {**OPTIONS, "cuda_graph_config": {}, "kv_cache_config": {"tokens_per_block": 32}}
    assert TrtllmBackend().lacking(replace(wanted, engine_options=options)) == [
        "kv_cache_config.tokens_per_block",
        "cuda_graph_config",
    ]


def test_knobs_become_build_flags(wanted: Launch) -> None:
    config = EngineConfig(
        quantization="fp8",
        kv_cache_dtype="fp8",
        max_batch_size=64,
        max_num_tokens=4096,
        max_seq_len=8192,
        tokens_per_block=64,
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
    )
    options = {"build_arguments": "--opt_num_tokens 512"}
    line = " ".join(build_flags(replace(wanted, config=config, options=options)))
    for part in (
        "--max_batch_size 64", "--max_num_tokens 4096", "--max_seq_len 8192",
        "--max_input_len 8192", "--tokens_per_block 64", "--kv_cache_type paged",
        "--use_paged_context_fmha enable", "--use_fp8_context_fmha enable",
        "--gemm_plugin disable", "--multiple_profiles enable", "--workers 4",
        "--opt_num_tokens 512",
    ):  # fmt: skip
        assert part in line


def test_the_benchmark_program_runs_an_engine(wanted: Launch) -> None:
    backend = TrtllmBenchBackend()
    # A name that is a folder too is refused by the program.
    wanted = replace(wanted, model=replace(wanted.model, hub_name=str(wanted.workdir)))
    check_can_run(backend, wanted)
    ready = backend.prepare(wanted, limit_s=30)
    result = backend.benchmark(ready, PROMPTS, protocol=ClosedLoop(concurrency=2), limit_s=60)
    assert f" --engine_dir {ready.options['engine_dir']} " in result.command
    assert result.measured["tpot_ms"]["mean"] == 10.0
