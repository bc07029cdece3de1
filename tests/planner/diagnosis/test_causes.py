"""Runs made from the simulator's own prediction with one thing spoiled: that one is found again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from planner.diagnosis.diagnose import RunLimits, diagnose_record
from planner.diagnosis.finding import Diagnosis, Finding
from planner.diagnosis.prospect import COMPARED, SimulatedProspect, prospect_of
from planner.diagnosis.request_log import RequestLog
from planner.diagnosis.shortage import shortage_in_log
from planner.prediction.predict import Prediction
from planner.workloads.measured import parse_run

HERE = Path(__file__).parent

CONFIG: Mapping[str, Any] = {
    "quantization": "bf16",
    "kv_cache_dtype": "bf16",
    "max_batch_size": 64,
    "max_num_tokens": 8192,
    "max_seq_len": 4096,
    "enable_chunked_prefill": True,
    "cuda_graph_max_batch_size": 64,
    "cuda_graph_padding": True,
}

WORKLOAD: Mapping[str, Any] = {
    "protocol": "closed_loop", "concurrency": 32, "num_requests": 96, "isl": 512, "osl": 64,
}  # fmt: skip


def record_of(
    *,
    config: Mapping[str, Any] | None = None,
    workload: Mapping[str, Any] | None = None,
    gpu: str = "h100",
    **changes: Any,
) -> dict[str, Any]:
    return {
        "run_id": "made",
        "gpu": gpu,
        "engine": "trtllm",
        "model": "llama-3.1-8b",
        "config": {**CONFIG, **(config or {})},
        "workload": {**WORKLOAD, **(workload or {})},
        "status": "ok",
        **changes,
    }


def simulated(record: Mapping[str, Any]) -> SimulatedProspect:
    prospect = prospect_of(parse_run(record, HERE))
    assert isinstance(prospect, SimulatedProspect)
    return prospect


def as_measured(prediction: Prediction) -> dict[str, float]:
    return {name: prediction.value(name) for name in COMPARED}


def diagnosis_of(record: Mapping[str, Any], **more: Any) -> Diagnosis:
    return diagnose_record(record, folder=HERE, **more)


def found(cause: str, diagnosis: Diagnosis) -> Finding:
    return next(r.finding for r in diagnosis.findings if r.finding.cause == cause)


def test_a_run_as_predicted_is_well() -> None:
    record = record_of()
    measured = as_measured(simulated(record).base)
    assert diagnosis_of({**record, "measured": measured}).is_well


def test_a_throttled_gpu_accounts_for_all_that_its_clock_cost() -> None:
    record = record_of(
        flags=["throttled"],
        machine={
            "sm_clock_mhz": {"mean": 990.0},
            "max_sm_clock_mhz": 1980,
            "throttle_fraction": {"hw_thermal_slowdown": 0.8},
        },
    )
    slow = simulated(record).with_clock(0.5)
    diagnosis = diagnosis_of({**record, "measured": as_measured(slow)})
    first = diagnosis.findings[0]
    assert first.finding.cause == "throttled"
    shares = [share for c, share in first.shares.items() if c.is_trouble]
    assert shares == pytest.approx([1.0] * len(shares), abs=0.01)
    assert "hw_thermal_slowdown in 80 % of the samples" in first.finding.evidence


def test_a_batch_outside_the_cuda_graphs_is_found_with_the_knob() -> None:
    tiny: dict[str, Any] = {"model": "tinyllama-1.1b"}
    record = record_of(config={"cuda_graph_max_batch_size": 8, "max_seq_len": 1024}, **tiny)
    base = simulated(record).base
    diagnosis = diagnosis_of({**record, "measured": as_measured(base)})
    finding = found("cuda_graphs", diagnosis)
    assert "largest captured batch 8" in finding.evidence[1]
    remedy = finding.remedies[0]
    assert remedy.knob == "cuda_graph_config.max_batch_size"
    covered = simulated(record_of(config={"max_seq_len": 1024}, **tiny)).base
    after = {effect.metric: effect.after for effect in remedy.effects}
    assert after["tpot_ms.mean"] == pytest.approx(covered.value("tpot_ms.mean"), rel=1e-6)


def test_a_shared_prefix_that_is_computed_each_time_is_missed_reuse() -> None:
    record = record_of(
        config={"enable_block_reuse": False},
        workload={"isl": 3000, "shared_prefix_tokens": 2560},
    )
    diagnosis = diagnosis_of({**record, "measured": as_measured(simulated(record).base)})
    finding = found("prefix_reuse_missing", diagnosis)
    assert "2560 tokens are shared: 85 % of all prompt tokens; 0 % came from the cache" in (
        finding.evidence
    )
    assert finding.remedies[0].action == "kv_cache_config.enable_block_reuse False → True"
    ttft = next(e for e in finding.remedies[0].effects if e.metric == "ttft_ms.mean")
    assert ttft.ratio < 0.5


def test_a_precision_that_alone_is_slow_runs_on_the_wrong_kernel() -> None:
    slow, sound = record_of(config={"quantization": "fp8"}), record_of(run_id="beside")
    twice = {
        name: value * (0.5 if name.endswith("_per_s") else 2.0)
        for name, value in as_measured(simulated(slow).base).items()
    }
    beside = {**sound, "measured": as_measured(simulated(sound).base)}
    diagnosis = diagnosis_of({**slow, "measured": twice}, others=[beside])
    assert diagnosis.findings[0].finding.cause == "wrong_kernel"
    # All precisions slow alike is no kernel's fault.
    as_slow = {**beside, "measured": {k: 2 * v for k, v in beside["measured"].items()}}
    causes = [
        r.finding.cause
        for r in diagnosis_of({**slow, "measured": twice}, others=[as_slow]).findings
    ]
    assert "wrong_kernel" not in causes


def test_fp8_on_a_gpu_without_it_is_emulated() -> None:
    record = record_of(config={"quantization": "fp8"}, gpu="a100")
    finding = found("emulated_precision", diagnosis_of(record))
    assert "has no FP8 arithmetic" in finding.words


def test_weights_of_four_bits_lose_at_a_large_batch() -> None:
    record = record_of(
        config={
            "quantization": "w4a16_awq",
            "max_batch_size": 256,
            "cuda_graph_max_batch_size": 256,
        },
        workload={"concurrency": 128, "num_requests": 256},
    )
    diagnosis = diagnosis_of({**record, "measured": as_measured(simulated(record).base)})
    finding = found("weight_only_at_large_batch", diagnosis)
    assert "fp8" in finding.remedies[0].action


def test_a_client_that_is_late_takes_its_own_delay() -> None:
    record = record_of(
        flags=["client_limited"],
        client={"limited": True, "loop_lag_ms": {"p99": 40.0}, "cpu_fraction": 0.97},
    )
    measured = as_measured(simulated(record).base)
    measured["tpot_ms.mean"] += 40.0
    finding = found("client_limited", diagnosis_of({**record, "measured": measured}))
    assert finding.ratios["tpot_ms.mean"] == pytest.approx(1 - 40.0 / measured["tpot_ms.mean"])


def test_memory_that_others_hold_shows_in_the_pool() -> None:
    record = record_of(workload={"concurrency": 64, "num_requests": 192})
    prospect = simulated(record)
    held = prospect.with_knobs(kv_cache_max_tokens=8192)
    assert held is not None
    measured = {**as_measured(held), "kv_cache_tokens": 8192.0}
    diagnosis = diagnosis_of({**record, "measured": measured})
    assert diagnosis.findings[0].finding.cause == "smaller_kv_pool"


def test_prompts_longer_than_a_step_are_refused_without_chunks() -> None:
    record = record_of(
        config={"enable_chunked_prefill": False, "max_num_tokens": 1024},
        workload={"isl": 2000},
        status="refused",
        error="40 of 96 requests refused: prompt too long",
    )
    diagnosis = diagnosis_of(record)
    assert "refused_requests" in [r.finding.cause for r in diagnosis.findings]


@pytest.mark.parametrize(
    ("log", "short_gib"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 "
            "GiB of which 512.00 MiB is free. Including non-PyTorch memory",
            2.0,
        ),
        (
            "To serve at least one request with the model's max seq len (131072), (16.0 GiB KV "
            "cache is needed, which is larger than the available KV cache memory (9.5 GiB). Based",
            6.5,
        ),
        (
            "Free memory on device cuda:0 (44.6/79.6 GiB) on startup is less than desired GPU "
            "memory utilization (0.9, 71.6 GiB). Decrease",
            27.0,
        ),
    ],
)
def test_logs_say_how_many_bytes_were_missing(log: str, short_gib: float) -> None:
    shortage = shortage_in_log(log)
    assert shortage is not None
    assert shortage.short_bytes == pytest.approx(short_gib * 2**30)


def test_a_gap_belongs_to_the_prompt_that_ends_with_it() -> None:
    """Two requests: one decodes every 10 ms, but for one gap in which the other's prompt runs."""
    lines = [
        {"arrival_s": 0.0, "isl": 10, "osl": 6, "ttft_ms": 10, "e2el_ms": 140,
         "itl_ms": [10, 10, 90, 10, 10]},
        {"arrival_s": 0.035, "isl": 900, "osl": 2, "ttft_ms": 85, "e2el_ms": 95, "itl_ms": [10]},
    ]  # fmt: skip
    log = RequestLog.of(lines)
    assert log.long_gaps_with_prefill == 1.0
    assert log.short_gaps_with_prefill == 0.0
    assert log.decode_share_of_long_gaps == pytest.approx(80 / 140)
    assert log.most_decoding == 2
    assert log.longest_silence() == pytest.approx((0.035, 0.12))


def test_four_bit_weights_over_the_limit_name_what_keeps_it() -> None:
    record = record_of(config={"quantization": "w4a16_awq"})
    measured = as_measured(simulated(record).base)
    allowed = RunLimits(max_quality_loss_pct=1.0)
    diagnosis = diagnosis_of({**record, "measured": measured}, limits=allowed)
    first = diagnosis.findings[0]
    assert (first.finding.cause, first.share) == ("quality_degradation", 1.0)
    turned = {remedy.action: remedy for remedy in first.finding.remedies}
    to_bf16 = next(r for action, r in turned.items() if action.endswith("→ bf16"))
    assert to_bf16.note == "loses 0.00 %"
    assert {effect.metric for effect in to_bf16.effects} & {"tpot_ms.mean", "output_tok_per_s"}
