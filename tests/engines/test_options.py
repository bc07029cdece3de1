"""Every knob of every engine is sent or refused, and options read back as what wrote them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cost_models.engine import KNOBS, EngineConfig
from cost_models.errors import ConfigError
from cost_models.model import ModelSpec
from cost_models.profile_io import load_gpu, load_model
from engines.base import EngineSpec
from engines.registry import find_engine, list_engines
from executor.backend import Launch, ModelSource, load_backend
from executor.backends.vllm import flags

DENSE, EXPERTS = load_model("llama-3.1-8b"), load_model("mixtral-8x7b")
BLACKWELL = load_gpu("b200")

DRAFT = "meta-llama/Llama-3.2-1B-Instruct"

"""Knobs that no server is told: they say how many servers there are."""

OTHER_VALUES: dict[str, tuple[Any, ...]] = {
    "quantization": ("fp16", "fp8"),
    "kv_cache_dtype": ("fp8",),
    "tensor_parallel_size": (2,),
    "pipeline_parallel_size": (2,),
    "moe_expert_parallel_size": (4,),
    "enable_attention_dp": (True,),
    "moe_backend": ("TRTLLM", "DEEPGEMM"),
    "max_batch_size": (48,),
    "max_num_tokens": (4096,),
    "max_seq_len": (2048,),
    "tokens_per_block": (64,),
    "free_gpu_memory_fraction": (0.8,),
    "gpu_memory_utilization": (0.8,),
    "kv_cache_max_tokens": (65536,),
    "enable_chunked_prefill": (True, False),
    "enable_block_reuse": (False,),
    "enable_partial_reuse": (False,),
    "host_cache_size": (10**9,),
    "capacity_scheduler_policy": (
        "GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH", "RECOMPUTE",
    ),
    "queue_order": ("PRIORITY", "SHORTEST_JOB_FIRST", "LONGEST_PREFIX_MATCH"),
    "context_chunking_policy": ("EQUAL_PROGRESS",),
    "cuda_graph_max_batch_size": (0, 16, 64),
    "cuda_graph_padding": (True, False),
    "enable_piecewise_cuda_graph": (True,),
    "stream_interval": (4,),
    "disable_overlap_scheduler": (True,),
    "allreduce_strategy": ("NCCL",),
    "decoding_type": ("NGram", "DraftTarget", "Eagle", "MTP", "Medusa"),
    "max_draft_len": (3,),
    "speculative_model": ("meta-llama/Llama-3.1-8B-Instruct",),
    "max_matching_ngram_size": (4,),
}  # fmt: skip
"""Values beside the defaults, by knob."""

every_engine = pytest.mark.parametrize("name", list_engines())


def in_use(config: EngineConfig, knob: str) -> EngineConfig:
    """Return a configuration in which a knob means something."""
    if knob == "context_chunking_policy":
        return replace(config, enable_chunked_prefill=True)
    if knob in ("moe_expert_parallel_size", "enable_attention_dp"):
        return replace(config, tensor_parallel_size=4)
    if knob in ("max_draft_len", "max_matching_ngram_size"):
        return replace(config, decoding_type="NGram", max_draft_len=2)
    if knob == "speculative_model":
        return replace(config, decoding_type="Eagle", max_draft_len=2, speculative_model=DRAFT)
    if knob == "decoding_type":
        return replace(config, max_draft_len=2, speculative_model=DRAFT)
    return config


def told(spec: EngineSpec, config: EngineConfig) -> Any:
    """Return all that an engine is told of a configuration: options, flags and checkpoint."""
    launch = spec.launch_files(config, EXPERTS, {})
    return spec.options(config, EXPERTS), launch.options, launch.build_script


def test_the_walk_knows_every_knob() -> None:
    assert set(OTHER_VALUES) == set(KNOBS)


@pytest.mark.parametrize("knob", sorted(OTHER_VALUES))
@every_engine
def test_a_knob_is_sent_or_refused(name: str, knob: str) -> None:
    spec = find_engine(name)
    base = in_use(EngineConfig(**spec.defaults), knob)
    for value in OTHER_VALUES[knob]:
        config = replace(base, **{knob: value})
        if config == base:
            continue
        known = {str(v) for v in spec.rules.violations(base, model=EXPERTS, gpu=BLACKWELL)}
        refused = [
            violation
            for violation in spec.rules.violations(config, model=EXPERTS, gpu=BLACKWELL)
            if violation.knob == knob and str(violation) not in known
        ]
        if not refused:
            assert told(spec, config) != told(spec, base), f"{knob}={value} is never sent"


def launched(name: str, config: EngineConfig, folder: Path) -> Any:
    """Return what the backend of an engine hands to it, or None where it refuses."""
    launch = deployment(config, folder)
    if load_backend(name).lacking(launch):
        return None
    try:
        files = find_engine(name).launch_files(config, EXPERTS, {})
    except ConfigError:
        return None
    return files, flags(launch) if not files.options else []


@pytest.mark.parametrize("knob", sorted(OTHER_VALUES))
@every_engine
def test_a_launch_says_a_knob_or_refuses_it(name: str, knob: str, tmp_path: Path) -> None:
    base = in_use(EngineConfig(**find_engine(name).defaults), knob)
    usual = launched(name, base, tmp_path)
    for value in OTHER_VALUES[knob]:
        config = replace(base, **{knob: value})
        if config != base:
            assert (said := launched(name, config, tmp_path)) is None or said != usual, value


@every_engine
def test_what_cannot_be_sent_is_refused_at_the_launch(name: str, tmp_path: Path) -> None:
    spec, backend = find_engine(name), load_backend(name)
    for knob, rule in spec.rules.fixed.items():
        assert getattr(EngineConfig(**spec.defaults), knob) in rule.values, knob
        for value in set(OTHER_VALUES[knob]) - set(rule.values):
            config = replace(EngineConfig(**spec.defaults), **{knob: value})
            lacking = backend.lacking(deployment(config, tmp_path))
            assert any(text.startswith(f"{knob}={value}: accepted") for text in lacking), lacking


def test_experts_are_spread_over_all_ranks_of_vllm_or_none(tmp_path: Path) -> None:
    config = EngineConfig(
        **find_engine("vllm").defaults, tensor_parallel_size=4, moe_expert_parallel_size=2
    )
    lacking = load_backend("vllm").lacking(deployment(config, tmp_path))
    assert [text.partition("=")[0] for text in lacking] == ["moe_expert_parallel_size"]
    whole = replace(config, moe_expert_parallel_size=4)
    assert load_backend("vllm").lacking(deployment(whole, tmp_path)) == []


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"queue_order": "PRIORITY"}, "--scheduling-policy priority"),
        ({"cuda_graph_max_batch_size": 64}, "--max-cudagraph-capture-size 64"),
        ({"cuda_graph_max_batch_size": 0}, "--enforce-eager"),
        ({"disable_overlap_scheduler": True}, "--no-async-scheduling"),
        ({"stream_interval": 4}, "--stream-interval 4"),
        # It never captures more than twice the batch: said, so that it does not.
        ({"max_batch_size": 32}, "--max-cudagraph-capture-size 64"),
    ],
)
def test_vllm_is_told_by_flags(knobs: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = EngineConfig(**{**find_engine("vllm").defaults, **knobs})
    assert words in " ".join(flags(deployment(config, tmp_path)))


def deployment(config: EngineConfig, folder: Path) -> Launch:
    return Launch(
        model=ModelSource(
            name="one", hub_name="one/one", vocab_size=1000, max_position_embeddings=4096
        ),
        config=config,
        workdir=folder,
    )


@st.composite
def configs(draw: st.DrawFn, spec: EngineSpec, model: ModelSpec) -> EngineConfig:
    """Draw configurations of which an engine refuses nothing."""
    defaults = EngineConfig(**spec.defaults)
    free = {
        knob: st.sampled_from((getattr(defaults, knob), *values))
        for knob, values in OTHER_VALUES.items()
        if knob not in spec.rules.fixed
        and knob not in ("decoding_type", "max_draft_len", "speculative_model", "moe_backend")
    }
    free |= {
        "capacity_scheduler_policy": st.sampled_from(
            spec.rules.knobs["capacity_scheduler_policy"].values
        ),
        "queue_order": st.sampled_from(spec.rules.knobs["queue_order"].values),
        "max_batch_size": st.integers(1, 2048),
        "max_num_tokens": st.integers(2048, 65536),
        "max_seq_len": st.integers(16, 100_000),
        "cuda_graph_max_batch_size": st.integers(0, 2048),
    }
    config = replace(defaults, **{knob: draw(values) for knob, values in free.items()})
    kind = draw(st.sampled_from(("", "", *spec.rules.speculation)))
    if kind:
        config = replace(
            config,
            decoding_type=kind,
            max_draft_len=draw(st.integers(1, 8)),
            speculative_model=DRAFT if spec.rules.speculation[kind].needs_model else "",
        )
    assume(not spec.rules.violations(config, model=model, gpu=BLACKWELL))
    return config


@every_engine
@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=lambda model: model.name)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_options_read_back_as_what_wrote_them(
    name: str, model: ModelSpec, data: st.DataObject
) -> None:
    spec = find_engine(name)
    config = data.draw(configs(spec, model))
    written = spec.options(config, model)
    base = replace(EngineConfig(**spec.defaults), quantization=config.quantization)
    read, ignored = spec.read_options(yaml.safe_load(yaml.safe_dump(dict(written))), base)
    assert spec.options(read, model) == written
    assert set(ignored) <= {"moe_tensor_parallel_size"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max-num-seq": 4}, "max-num-seqs"),
        ({"max-num-seqs": "many"}, "type int"),
        ({"scheduling-policy": "random"}, "fcfs, priority"),
        ({"speculative-config": "{"}, "JSON"),
        ({"speculative-config": {"method": "magic"}}, "ngram"),
        ({"quantization": "awq"}, "fp8"),
        ({"dtype": "float64"}, "bfloat16"),
    ],
)
def test_a_wrong_option_of_vllm_is_refused(options: dict[str, Any], message: str) -> None:
    spec = find_engine("vllm")
    with pytest.raises(ConfigError) as caught:
        spec.read_options(options, EngineConfig(**spec.defaults))
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_vllms_own_spellings_are_read() -> None:
    spec = find_engine("vllm")
    options = {
        "max_num_seqs": 64, "no-enable-prefix-caching": True, "enforce-eager": True,
        "speculative-config": '{"method": "ngram", "num_speculative_tokens": 3}', "port": 9000,
    }  # fmt: skip
    config, ignored = spec.read_options(options, EngineConfig(**spec.defaults))
    assert (config.max_batch_size, config.enable_block_reuse) == (64, False)
    assert config.cuda_graph_max_batch_size == 0
    assert (config.decoding_type, config.max_draft_len) == ("NGram", 3)
    assert ignored == ["port"]


@pytest.mark.parametrize(("checkpoint", "read"), [("bf16", "fp16"), ("fp8", "fp8")])
@every_engine
def test_a_dtype_changes_weights_that_are_not_quantized(
    name: str, checkpoint: str, read: str
) -> None:
    spec = find_engine(name)
    base = replace(EngineConfig(**spec.defaults), quantization=checkpoint)
    config, _ = spec.read_options({"dtype": "float16"}, base)
    assert config.quantization == read
