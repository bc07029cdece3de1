"""Every backend against one contract, with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trustme

from cost_models.errors import ConfigError
from executor.backend import (
    Backend,
    BenchmarkBackend,
    Failure,
    Launch,
    Server,
    ServerFailedError,
    ServingBackend,
    backend_names,
    check_can_run,
    load_backend,
)
from executor.backends.endpoint import EndpointBackend
from executor.backends.transformers import TransformersBackend, server_settings
from executor.backends.trtllm import TrtllmBackend
from executor.backends.trtllm_bench import TrtllmBenchBackend
from executor.backends.vllm import VllmBackend, flags
from executor.load_generator import run_load
from executor.process_group import MARKER
from executor.protocols import ClosedLoop, OfflineBurst, OpenLoop
from executor.records import RequestStatus
from executor.traffic import random_prompts
from tests.executor.conftest import STAND_INS, TEST_RUN, TINY_MODEL, tiny_deployment
from tests.executor.openai_server import OpenAiServer

START_S = 90.0

TRTLLM_OPTIONS: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 128,
    "kv_cache_config": {"tokens_per_block": 32, "dtype": "fp8"},
    "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
    "cuda_graph_config": None,
}

PROMPTS = random_prompts([5, 9, 30, 17], [8, 8, 3, 12], vocab_size=256, seed=1)


def marked_processes() -> set[int]:
    """Live processes of servers that these tests have started."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        is_server = f"\0{MARKER}=".encode() in environment and TEST_RUN.encode() in environment
        if is_server and state != "Z":
            found.add(int(entry.name))
    return found - {os.getpid()}


class BackendContract:
    """What every backend must do."""

    backend: ClassVar[Backend]
    checks_configurations = True
    """Whether it brings the engine up itself, and so can refuse what the engine cannot do."""

    @pytest.fixture
    def prepared(self, deployment: Launch) -> Launch:
        return deployment

    def test_it_is_found_by_name(self) -> None:
        assert self.backend.name in backend_names()
        assert type(load_backend(self.backend.name)) is type(self.backend)

    def test_its_runs_name_their_engine(self, prepared: Launch) -> None:
        assert self.backend.availability().can_run
        assert self.backend.engine_of(prepared).startswith(self.backend.engine)

    def test_what_it_lacks_is_one_line_before_anything_starts(self, prepared: Launch) -> None:
        before = marked_processes()
        wanted = replace(
            prepared,
            config=replace(
                prepared.config, queue_order="LONGEST_PREFIX_MATCH", tensor_parallel_size=2
            ),
        )
        if not self.checks_configurations:
            assert not self.backend.lacking(wanted)
            return
        with pytest.raises(ServerFailedError) as caught:
            check_can_run(self.backend, wanted)
        assert caught.value.kind is Failure.NOT_AVAILABLE
        assert "\n" not in caught.value.message
        assert marked_processes() == before


class ServingContract(BackendContract):
    """What every backend with a server must do beside."""

    backend: ClassVar[ServingBackend]
    starts_processes = True

    def test_it_serves_exact_lengths_and_leaves_nothing(self, prepared: Launch) -> None:
        check_can_run(self.backend, prepared)
        before = marked_processes()
        ready = self.backend.prepare(prepared, limit_s=30)
        server = self.backend.start(ready, limit_s=START_S)
        try:
            assert bool(marked_processes() - before) is self.starts_processes
            self.check_serving(server)
        finally:
            server.stop()
        server.stop()
        assert marked_processes() == before
        if self.starts_processes:
            assert server.failure() is not None

    def check_serving(self, server: Server) -> None:
        result = asyncio.run(run_load(server.endpoint, PROMPTS, protocol=ClosedLoop(concurrency=3)))
        assert {(r.status, r.error) for r in result.requests} == {(RequestStatus.OK, "")}
        assert [r.osl for r in result.requests] == [p.osl for p in PROMPTS]
        assert server.failure() is None
        assert server.command
        assert all(value > 0 for value in server.facts().values())


@pytest.mark.usefixtures("stand_ins")
class TestVllm(ServingContract):
    backend = VllmBackend()

    def check_serving(self, server: Server) -> None:
        super().check_serving(server)
        facts = server.facts()
        assert facts["kv_cache_tokens"] == 896912
        assert facts["weight_bytes_per_gpu"] == pytest.approx(14.9889 * 2**30)
        assert facts["cuda_graph_bytes_per_gpu"] == pytest.approx(0.59 * 2**30)
        # The number of blocks is overridden, so what was available was not taken.
        assert "kv_cache_bytes_per_gpu" not in facts
        counters = {"num_preemptions": 4.0, "num_prefix_cache_hit_tokens": 0.0}
        assert server.counters() == counters

    def test_a_start_that_fails_leaves_nothing(
        self, deployment: Launch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = marked_processes()
        for failure, kind in (
            ("out_of_memory_at_start", Failure.OUT_OF_MEMORY),
            ("crashes_at_start", Failure.CRASHED_AT_START),
            ("never_answers", Failure.START_TIMED_OUT),
        ):
            monkeypatch.setenv("STAND_IN_FAILURE", failure)
            with pytest.raises(ServerFailedError) as caught:
                self.backend.start(deployment, limit_s=2.0 if kind == "start_timed_out" else 30.0)
            assert caught.value.kind is kind
            assert marked_processes() == before
        monkeypatch.setenv("STAND_IN_FAILURE", "crashes_at_start")
        with pytest.raises(ServerFailedError, match="ended with status 3") as caught:
            self.backend.start(deployment, limit_s=30.0)
        assert "architecture is not supported" in caught.value.log_tail

    def test_knobs_become_flags(self, deployment: Launch) -> None:
        config = replace(
            deployment.config,
            quantization="fp8",
            kv_cache_dtype="fp8",
            tokens_per_block=32,
            kv_cache_max_tokens=3200,
            enable_block_reuse=False,
            enable_chunked_prefill=False,
            cuda_graph_max_batch_size=0,
            tensor_parallel_size=2,
            moe_expert_parallel_size=2,
        )
        options = {"speculative_config": '{"method": "ngram"}', "arguments": "--seed 3"}
        line = " ".join(flags(replace(deployment, config=config, options=options)))
        for part in (
            "--max-num-seqs 4", "--max-num-batched-tokens 128", "--block-size 32",
            "--num-gpu-blocks-override 100", "--quantization fp8", "--kv-cache-dtype fp8",
            "--no-enable-prefix-caching", "--no-enable-chunked-prefill", "--enforce-eager",
            "--tensor-parallel-size 2",
            "--enable-expert-parallel", '--speculative-config {"method": "ngram"}', "--seed 3",
            "--load-format dummy", "--max-model-len 128",
        ):  # fmt: skip
            assert part in line

    @pytest.mark.parametrize(
        ("knobs", "options", "said"),
        [
            (
                {"decoding_type": "NGram", "max_draft_len": 3, "max_matching_ngram_size": 4},
                {},
                {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1},
            ),
            (
                {"decoding_type": "DraftTarget", "max_draft_len": 2, "speculative_model": "draft"},
                {"synthetic_acceptance": "0.8,0.5"},
                {
                    "method": "draft_model",
                    "rejection_sample_method": "synthetic",
                    # Chances that the first i are all kept, as vLLM takes them.
                    "synthetic_acceptance_rates": [0.8, 0.4],
                },
            ),
        ],
    )
    def test_drafts_are_configured_and_counted(
        self,
        deployment: Launch,
        knobs: dict[str, Any],
        options: dict[str, str],
        said: dict[str, Any],
    ) -> None:
        draft = replace(TINY_MODEL, name="draft") if "speculative_model" in knobs else None
        config = replace(deployment.config, **knobs)
        wanted = replace(deployment, config=config, options=options, draft=draft)
        check_can_run(self.backend, wanted)
        server = self.backend.start(wanted, limit_s=START_S)
        try:
            super().check_serving(server)
            counters = server.counters()
        finally:
            server.stop()
        words = shlex.split(server.command)
        given = json.loads(words[words.index("--speculative-config") + 1])
        assert given.items() >= said.items()
        assert given["num_speculative_tokens"] == config.max_draft_len
        assert (counters["num_drafts"], counters["num_accepted_draft_tokens"]) == (12.0, 8.0)
        assert counters["num_accepted_draft_tokens_at.0"] == 8.0
        assert counters["num_accepted_draft_tokens_at.1"] == 0.0

    def test_synthetic_acceptance_that_does_not_fit_is_refused(self, deployment: Launch) -> None:
        config = replace(deployment.config, decoding_type="NGram", max_draft_len=3)
        options = {"synthetic_acceptance": "0.8,0.5"}
        with pytest.raises(ConfigError, match="synthetic_acceptance") as caught:
            flags(replace(deployment, config=config, options=options))
        assert "3 numbers" in caught.value.hint

    def test_what_it_lacks_is_said_before_anything_starts(self, deployment: Launch) -> None:
        config = replace(deployment.config, kv_cache_dtype="nvfp4", enable_attention_dp=True)
        with pytest.raises(ServerFailedError, match=r"nvfp4.*enable_attention_dp") as caught:
            check_can_run(self.backend, replace(deployment, config=config))
        assert caught.value.kind is Failure.NOT_AVAILABLE


@pytest.mark.usefixtures("stand_ins")
class TestTrtllm(ServingContract):
    backend = TrtllmBackend()

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "packages"))

    @pytest.fixture
    def prepared(self, deployment: Launch) -> Launch:
        return replace(deployment, engine_options=TRTLLM_OPTIONS)

    def check_serving(self, server: Server) -> None:
        super().check_serving(server)
        facts = server.facts()
        assert facts["kv_cache_tokens"] == 370688
        assert facts["kv_cache_bytes_per_gpu"] == pytest.approx(45.25 * 2**30)

    def test_options_that_the_installed_version_lacks_are_named(self, prepared: Launch) -> None:
        options = {
            **TRTLLM_OPTIONS,
            "disagg_config": {},
            "kv_cache_config": {"dtype": "auto", "disk_cache_size": 3},
            "moe_config": {"backend": "AUTO"},
        }
        with pytest.raises(ServerFailedError) as caught:
            check_can_run(self.backend, replace(prepared, engine_options=options))
        for name in ("disagg_config", "kv_cache_config.disk_cache_size", "moe_config.backend=AUTO"):
            assert name in str(caught.value)
        assert "max_batch_size" not in str(caught.value)

    def test_a_checkpoint_is_quantized_once(self, prepared: Launch) -> None:
        script = 'mkdir "$CHECKPOINT" && echo "{}" > "$CHECKPOINT/config.json"'
        real = replace(TINY_MODEL, has_random_weights=False)
        wanted = replace(prepared, model=real, build_script=script)
        for _ in range(2):
            built = self.backend.prepare(wanted, limit_s=30)
            assert built.model.folder == prepared.workdir / "tiny-bf16-kv-bf16"

    @pytest.mark.parametrize(
        ("script", "limit_s"), [("echo no space left; exit 4", 30), ("sleep 600", 0.5)]
    )
    def test_a_build_that_fails_is_an_error(
        self, prepared: Launch, script: str, limit_s: float
    ) -> None:
        real = replace(TINY_MODEL, has_random_weights=False)
        before = marked_processes()
        with pytest.raises(ServerFailedError) as caught:
            self.backend.prepare(
                replace(prepared, model=real, build_script=script), limit_s=limit_s
            )
        assert caught.value.kind is Failure.PREPARE_FAILED
        assert marked_processes() == before

    def test_a_checkpoint_of_the_person_is_taken(self, prepared: Launch) -> None:
        given = replace(prepared, options={"checkpoint": "/data/mine"}, build_script="exit 1")
        assert self.backend.prepare(given, limit_s=1).model.folder == Path("/data/mine")


class TestTransformers(ServingContract):
    """Truly generates, on the CPU, with random weights."""

    backend = TransformersBackend()

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")

    def check_serving(self, server: Server) -> None:
        super().check_serving(server)
        assert server.facts()["kv_cache_tokens"] == 1024
        too_long = random_prompts([120], [20], vocab_size=256, seed=0)
        result = asyncio.run(run_load(server.endpoint, too_long, protocol=OfflineBurst()))
        assert result.requests[0].status is RequestStatus.REFUSED
        assert "120 + 20 tokens are over 128" in result.requests[0].error

    def test_knobs_keep_their_meaning(self, deployment: Launch) -> None:
        config = replace(deployment.config, cuda_graph_max_batch_size=0, enable_block_reuse=False)
        settings = server_settings(replace(deployment, config=config), 1)
        batching = settings["continuous_batching"]
        assert settings["tokens_per_block"] == 16
        assert batching["num_blocks"] == 64
        assert batching["max_batch_tokens"] == 128
        assert batching["max_requests_per_batch"] == 4
        assert batching["use_cuda_graph"] is False
        assert batching["allow_block_sharing"] is False

    def test_it_lacks_quantization_and_several_gpus(self, deployment: Launch) -> None:
        config = replace(deployment.config, quantization="fp8", tensor_parallel_size=2)
        lacking = self.backend.lacking(replace(deployment, config=config))
        assert any("fp8" in line for line in lacking)
        assert "more than one GPU" in lacking


@contextmanager
def served(server: OpenAiServer) -> Iterator[str]:
    """Run a server in a thread, as if somebody else had started it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = server.running()
    asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class TestEndpoint(ServingContract):
    backend = EndpointBackend()
    starts_processes = False
    checks_configurations = False

    @pytest.fixture
    def prepared(self, deployment: Launch) -> Iterator[Launch]:
        with served(OpenAiServer()) as url:
            yield replace(deployment, options={"url": url})

    def start(self, url: str, **options: str) -> Server:
        deployment = tiny_deployment(Path("unused"), options={"url": url, **options})
        return self.backend.start(deployment, limit_s=5.0)

    @pytest.mark.parametrize(
        ("server", "exact"),
        [
            (OpenAiServer(knows_running_counts=False), True),
            (OpenAiServer(known_options=("ignore_eos",)), True),
            (OpenAiServer(known_options=()), False),
        ],
    )
    def test_it_finds_what_a_server_takes(self, server: OpenAiServer, exact: bool) -> None:
        with served(server) as url:
            found = self.start(url)
            self.check_serving(found)
        assert found.endpoint.exact_lengths is exact
        assert bool(found.notes) is not exact
        assert isinstance(server.bodies[-1]["prompt"], list)

    def test_a_chat_server_is_measured_with_approximate_lengths(self) -> None:
        server = OpenAiServer(takes_token_ids=False, takes_text=False, short_by=1)
        with served(server) as url:
            found = self.start(url)
            result = asyncio.run(
                run_load(found.endpoint, PROMPTS, protocol=ClosedLoop(concurrency=1))
            )
        assert {r.status for r in result.requests} == {RequestStatus.OK}
        assert any("approximate" in note for note in found.notes)
        content = server.bodies[-1]["messages"][0]["content"]
        assert len(content.split()) == len(PROMPTS[-1].token_ids)

    def test_a_text_server_gets_text(self) -> None:
        server = OpenAiServer(takes_token_ids=False)
        with served(server) as url:
            found = self.start(url)
        assert found.endpoint.path == "/v1/completions"
        assert not found.endpoint.exact_lengths

    def test_a_server_that_refuses_everything_is_an_error(self) -> None:
        server = OpenAiServer(takes_token_ids=False, takes_text=False, http_status=500)
        with served(server) as url, pytest.raises(ServerFailedError) as caught:
            self.start(url)
        assert caught.value.kind is Failure.NOT_AVAILABLE
        assert "no token ids" in caught.value.log_tail

    def test_an_encrypted_server_is_measured_if_its_certificate_is_trusted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        authority, certificate = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(certificate)
        with served(OpenAiServer(certificate=certificate)) as plain_url:
            url = plain_url.replace("http:", "https:")
            with pytest.raises(ServerFailedError, match="CERTIFICATE_VERIFY_FAILED"):
                self.start(url)
            authority.cert_pem.write_to_path(tmp_path / "ca.pem")
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            found = self.start(url)
            assert found.command.startswith("https://127.0.0.1:")
            self.check_serving(found)

    def test_nobody_there(self) -> None:
        with served(OpenAiServer()) as url:
            pass
        with pytest.raises(ServerFailedError, match="Connection refused"):
            self.start(url)

    @pytest.mark.parametrize("url", ["", "ftp://example.com", "localhost:8000"])
    def test_a_url_that_cannot_be_measured(self, url: str) -> None:
        with pytest.raises(ConfigError, match="not http://"):
            self.start(url)


class BenchmarkContract(BackendContract):
    """What every backend with a benchmark of the engine's own must do beside."""

    backend: ClassVar[BenchmarkBackend]

    def test_it_measures_every_request_and_leaves_nothing(self, prepared: Launch) -> None:
        before = marked_processes()
        check_can_run(self.backend, prepared)
        ready = self.backend.prepare(prepared, limit_s=30)
        protocol = ClosedLoop(concurrency=2)
        result = self.backend.benchmark(ready, PROMPTS, protocol=protocol, limit_s=60)
        assert [(r.isl, r.osl) for r in result.requests] == [
            (len(p.token_ids), p.osl) for p in PROMPTS
        ]
        assert result.measured["output_tok_per_s"] > 0
        assert result.command
        assert marked_processes() == before

    def test_one_that_never_ends_is_hung_and_leaves_nothing(
        self, prepared: Launch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = marked_processes()
        monkeypatch.setenv("STAND_IN_FAILURE", "never_ends")
        with pytest.raises(ServerFailedError) as caught:
            self.backend.benchmark(prepared, PROMPTS, protocol=OfflineBurst(), limit_s=1)
        assert caught.value.kind is Failure.HUNG
        assert marked_processes() == before


@pytest.mark.usefixtures("stand_ins")
class TestTrtllmBench(BenchmarkContract):
    backend = TrtllmBenchBackend()

    @pytest.fixture
    def prepared(self, deployment: Launch) -> Launch:
        return replace(deployment, engine_options=TRTLLM_OPTIONS)

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "packages"))

    @pytest.mark.parametrize("mode", ["throughput", "latency"])
    def test_it_reads_what_the_program_writes(self, deployment: Launch, mode: str) -> None:
        wanted = replace(deployment, engine_options=TRTLLM_OPTIONS, options={"mode": mode})
        backend: BenchmarkBackend = self.backend
        check_can_run(backend, wanted)
        result = backend.benchmark(wanted, PROMPTS, protocol=ClosedLoop(concurrency=2), limit_s=60)
        assert result.measured["tpot_ms"]["mean"] == 10.0
        assert result.measured["num_preemptions"] == 4.0
        assert "issue_rate" not in str(result.measured)
        assert f" {mode} " in result.command
        if mode == "throughput":
            assert result.requests[0].ttft_s == pytest.approx(0.05)
            assert result.requests[0].e2el_s == pytest.approx(0.05 + 7 * 0.01)

    def test_an_open_loop_is_refused(self, deployment: Launch) -> None:
        with pytest.raises(ServerFailedError, match="arrival times"):
            self.backend.benchmark(
                deployment, PROMPTS, protocol=OpenLoop(arrival_s=[0.0] * 4), limit_s=60
            )

    def test_its_failure_is_named(
        self, deployment: Launch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STAND_IN_FAILURE", "runs_out_of_memory")
        wanted = replace(deployment, engine_options=TRTLLM_OPTIONS)
        with pytest.raises(ServerFailedError) as caught:
            self.backend.benchmark(wanted, PROMPTS, protocol=OfflineBurst(), limit_s=60)
        assert caught.value.kind is Failure.OUT_OF_MEMORY


def test_unknown_backends_are_named() -> None:
    with pytest.raises(ConfigError, match=r"known: .*transformers"):
        load_backend("tgi")


def test_names_are_listed_without_importing_backends() -> None:
    program = (
        "import sys\nfrom executor.backend import backend_names, load_backend\n"
        "assert 'vllm' in backend_names()\n"
        "assert not [m for m in sys.modules if m.startswith('executor.backends')]\n"
        "for name in backend_names(): load_backend(name).availability()\n"
        "heavy = {'torch', 'transformers', 'vllm', 'tensorrt_llm', 'sqlalchemy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_is_missing_names_its_install_line(
    deployment: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ServerFailedError, match="pip install 'trtllm-planner") as caught:
        check_can_run(TrtllmBackend(), deployment)
    assert caught.value.kind is Failure.NOT_AVAILABLE
