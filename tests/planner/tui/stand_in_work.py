"""What the workers of the interface could have answered, written down: pictures need fixed data.

Nothing here comes from the cost model, so that a new calibration or knob changes no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cost_models.calibration import Provenance
from cost_models.cluster import Cluster
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.kv_cache import KvLayout
from cost_models.memory import MemoryPlan
from cost_models.profile_io import load_gpu
from executor.backend import Availability
from executor.machine import GpuSample
from executor.observe import LoadSeen, Observation
from planner import what_if as use_case
from planner.ladder.ladder import Figure, Ladder, Origin, Step
from planner.ladder.rungs import RUNGS
from planner.measuring import measure
from planner.measuring.measure import BackendState
from planner.plans.plan import Alternative, Neighbour, Plan
from planner.plans.scheduling import Scheduling
from planner.prediction.predict import Metric, Prediction
from planner.quality import QualityLoss, Source
from planner.question import PlanRequest, Problem
from planner.search.study import Candidate, SearchResult
from planner.simulator.timeline import DECODE, MIXED, Timeline
from planner.tui.catalogue import Catalogue, Entry, LocalGpus
from planner.tui.jobs import SearchSeen, Simulated
from planner.tui.question import Checked
from planner.tui.screens import what_if
from planner.tui.worker import Worker
from planner.validation.validate import Row, Validation
from planner.what_if import Answer, SensitivityPoint
from planner.workloads.measured import MeasuredRun

GIB = 2.0**30

KNOBS = ("quantization", "kv_cache_dtype", "tensor_parallel_size", "max_batch_size",
         "max_num_tokens", "tokens_per_block", "enable_chunked_prefill")  # fmt: skip

BATCHES = (32, 64, 128, 256, 512)

LOCAL = LocalGpus(words="✗ NVML finds no NVIDIA GPU on this machine")

DEFAULTS = {
    "model": "a-model-8b", "rate": "8", "isl": "1200", "osl": "200",
    "slo": "ttft_ms.p99=1000 tpot_ms.p99=50", "max_quality_loss": "no limit",
    "objective": "goodput",
}  # fmt: skip

CONFIG = EngineConfig(
    quantization="fp8", kv_cache_dtype="fp8", max_batch_size=256, max_num_tokens=2048,
    max_seq_len=8192,
)  # fmt: skip


LOSS = QualityLoss(
    loss_pct=0.9, spread_pct=0.8, provenance=Source.PUBLISHED, sources=("A paper: table 1",)
)


def answer_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every worker, and the closed form of what-if, answer with what is written here."""
    monkeypatch.setattr(Worker, "run", _run)
    monkeypatch.setattr(measure, "doctor", _backends)
    monkeypatch.setattr(what_if, "DEBOUNCE_S", 0.01)
    for module in (use_case, what_if):
        monkeypatch.setattr(module, "ask", _ask)
    monkeypatch.setattr(what_if, "knobs_of", lambda _problem: KNOBS)
    monkeypatch.setattr(what_if, "legal_values", lambda *_, **__: BATCHES)
    monkeypatch.setattr(what_if, "sensitivity_of", _sensitivity)


def _run(
    self: Worker,
    function: Callable[..., Any],
    *arguments: Any,
    heard: Callable[[Any], None] = lambda _message: None,
    stop: object = None,
) -> Any:
    """Stand in for `Worker.run`."""
    del self, stop
    answers: Mapping[str, Callable[..., Any]] = {
        "read_profiles": lambda _: catalogue(),
        "search": _search,
        "simulate": _simulate,
        "measure": _measure,
        "validate": lambda _heard, *_: validation(1.0),
        "diagnose": lambda _heard, _source, run_id, _question: _diagnosis(run_id),
        "predict_ladder": lambda _heard, *_: _ladder(),
        "recalibrate": lambda _heard, *_: (["tpot: 1.02 ± 0.01 (6 runs)"], validation(0.97)),
    }
    return answers[function.__name__](heard, *arguments)


def catalogue() -> Catalogue:
    """A few profiles."""
    entries = [
        Entry(kind="gpu", name=name, summary=f"{gib} GiB  {tb_per_s:.2f} TB/s  calibrated")
        for name, gib, tb_per_s in (("h100_sxm", 80, 3.35), ("h200_sxm", 140, 4.8))
    ]
    entries.append(Entry(kind="model", name="a-model-8b", summary="32 layers, bf16"))
    entries.append(Entry(kind="workload", name="chat", summary="Chat: 1200 in, 200 out, goodput"))
    for name in ("engines/trtllm", "h100_sxm/operators"):
        entries.append(Entry(kind="calibration", name=name, summary="9 KiB"))
    data = Path(__file__).parents[2] / "data" / "few.json"
    return Catalogue(entries=tuple(replace(e, path=data) for e in entries), local=LOCAL)


def _search(heard: Callable[[Any], None], *_: Any) -> tuple[Checked, Plan]:
    heard(DEFAULTS)
    heard(SearchSeen(evaluated=600, expected=1200, best="fp8 KV fp8 TP1"))
    problem = SimpleNamespace(
        gpu=SimpleNamespace(name="h100_sxm"), workload=SimpleNamespace(name="chat")
    )
    request = PlanRequest(gpu="h100_sxm", workload="chat")
    return Checked(problem=cast("Problem", problem), request=request), plan()


def plan() -> Plan:
    """A recommendation with all that stands around it."""
    front = tuple(_candidate(batch, 1000 + 60 * batch**0.8, 4000 / batch**0.6) for batch in BATCHES)
    exact = tuple(
        replace(_candidate(batch, 900 + 30 * batch**0.8, 3000 / batch**0.6), quality=QualityLoss())
        for batch in BATCHES[::2]
    )
    best = front[3]
    return Plan(
        status="feasible",
        objective="goodput",
        recommended=prediction(CONFIG),
        alternatives=(
            Alternative(
                prediction=prediction(replace(CONFIG, quantization="bf16"), slower=1.4),
                rejected_because="-31.0 % on the objective",
            ),
        ),
        neighbours=(
            Neighbour(knob="max_batch_size", value=128, changes={}, verdict="-6.6 % highest rate"),
        ),
        relaxations=(),
        scheduling=Scheduling(contention=0.0),
        search=SearchResult(
            candidates=(best, *front),
            pareto=(*front, *exact),
            num_evaluated=1234,
            wall_s=1.5,
            seed=0,
        ),
    )


def deployment_of(config: EngineConfig) -> Deployment:
    """One server of a configuration on an H100."""
    return Deployment.of(config, Cluster(gpu=load_gpu("h100"), num_gpus=config.num_gpus))


def _candidate(batch: int, per_gpu: float, per_user: float) -> Candidate:
    return Candidate(
        deployment=deployment_of(replace(CONFIG, max_batch_size=batch)),
        score=per_gpu, raw_score=per_gpu,
        violation=0.0, tok_per_s_per_gpu=per_gpu, tok_per_s_per_user=per_user,
        quality=LOSS,
    )  # fmt: skip


def prediction(config: EngineConfig, *, slower: float = 1.0) -> Prediction:
    """What a configuration would do; larger batches serve more, and slower."""
    slow = slower * (config.max_batch_size / 256) ** 0.5
    rate = 35.0 / slower * (config.max_batch_size / 256) ** 0.8
    means = {"ttft_ms": 43.0, "tpot_ms": 5.4, "itl_ms": 5.6, "e2el_ms": 1200.0}
    shares = {"mean": 1.0, "p50": 0.8, "p90": 1.9, "p99": 3.2}
    values = {f"{m}.{s}": mean * share * slow for m, mean in means.items()
              for s, share in shares.items()}  # fmt: skip
    values |= {
        "request_per_s": 8.0, "goodput_request_per_s": 8.0, "output_tok_per_s": 1700 / slower,
        "output_tok_per_s_per_gpu": 1700 / slower, "usd_per_million_output_tokens": 0.65 * slower,
        "output_tokens_per_joule": 7.3, "kv_cache_tokens": 1_000_000.0,
    }  # fmt: skip
    limits = {"ttft_ms.p99": 1000.0, "tpot_ms.p99": 50.0}
    return Prediction(
        deployment=deployment_of(config),
        metrics={name: _metric(value) for name, value in values.items()},
        memory=_memory(),
        step_time_breakdown={},
        fusion_savings={"decode": {"norms+residual": 5.1e-4, "SwiGLU": 4e-5, "attention": 1.3e-4}},
        quality=LOSS if config.quantization == "fp8" else QualityLoss(),
        slo_excess={name: values[name] / limit - 1 for name, limit in limits.items()},
        slo_probability=dict.fromkeys(limits, 0.9),
        highest_rate_per_s=rate,
        refused_share=0.0,
        front_end_share=0.1,
        regime="open_loop",
        binding_limit="step time: gemm takes 65 %",
    )


def _metric(value: float) -> Metric:
    bounds = (0.8 * value, 1.3 * value)
    return Metric(value=value, interval_90=bounds, provenance=Provenance.CALIBRATED)


def _memory() -> MemoryPlan:
    return MemoryPlan(
        layout=KvLayout(pools=()),
        total_bytes=80 * GIB,
        weight_bytes_per_gpu=8.5 * GIB,
        communication_bytes_per_gpu=0.0,
        runtime_bytes_per_gpu=3 * GIB,
        activation_bytes_per_gpu=np.asarray(0.5 * GIB),
        kv_cache_bytes_per_gpu=np.asarray(61 * GIB),
        cuda_graph_bytes_per_gpu=np.asarray(0.25 * GIB),
        reserved_bytes_per_gpu=np.asarray(7 * GIB),
        kv_cache_tokens=np.asarray(1_000_000),
        kv_cache_blocks=np.asarray(31_250),
        max_sequences=np.asarray(122),
        shortfall_bytes=np.asarray(0),
    )


def _ask(_problem: object, deployment: Deployment, settings: Mapping[str, str]) -> Answer:
    config = deployment.config
    batch = int(settings.get("max_batch_size", config.max_batch_size))
    changed = prediction(replace(config, max_batch_size=batch))
    return Answer(base=prediction(config), prediction=changed, not_deployable=())


def _sensitivity(
    _problem: object, deployment: Deployment, _knob: str, *, num_gpus: int
) -> tuple[SensitivityPoint, ...]:
    del num_gpus
    configs = [replace(deployment.config, max_batch_size=batch) for batch in BATCHES]
    return tuple(
        SensitivityPoint(value=c.max_batch_size, prediction=prediction(c), reason="")
        for c in configs
    )


def _simulate(
    _heard: object, _question: object, _calibration: str, deployment: Deployment,
    settings: Mapping[str, str],
) -> Simulated:  # fmt: skip
    at_s = np.linspace(0.0, 60.0, 200)
    used = 900 + 500 * np.sin(at_s / 8)
    seen = Timeline(
        at_s=at_s, used_blocks=used, wasted_blocks=0.1 * used, shared_blocks=np.full(200, 120.0),
        capacity_blocks=31_250.0, running=used / 20, waiting=np.zeros(200),
        step_s=np.full(200, 0.006), kind=np.where(at_s % 9 < 1, MIXED, DECODE),
    )  # fmt: skip
    return Simulated(prediction=_ask(None, deployment, settings).prediction, timeline=seen)


def _backends() -> list[BackendState]:
    here = Availability(can_run=True, version="5.17")
    missing = Availability(can_run=False, problem="not installed", install="pip install vllm")
    return [
        BackendState(name="transformers", availability=here),
        BackendState(name="vllm", availability=missing),
    ]


def _measure(heard: Callable[[Any], None], *_: Any) -> list[SimpleNamespace]:
    for second in range(1, 9):
        gpu = GpuSample(
            memory_used_bytes=70e9, power_w=400.0 + second, sm_clock_hz=1.98e9,
            temperature_c=60.0, busy_fraction=0.9,
        )  # fmt: skip
        load = LoadSeen(
            at_s=float(second), num_prompts=64, num_sent=8 * second, num_ended=7 * second,
            num_tokens=100 * second * second, ttft_s=(0.04, 0.05), gap_s=(0.005, 0.006),
        )  # fmt: skip
        seen = Observation(
            phase="run 1", left_s=60.0 - second, load=load, gpus=(gpu,), kv_used_fraction=0.4
        )
        heard((seen, "INFO: the engine is up\nINFO: 8 requests run"))
    return [SimpleNamespace(records=[_record("1", 5.6), _record("2", 5.7)])]


def _record(number: str, tpot_ms: float) -> dict[str, Any]:
    measured = {"tpot_ms": {"mean": tpot_ms}, "ttft_ms": {"mean": 45.0}, "request_per_s": 7.9}
    return {"run_id": f"a-{number}", "gpu": "h100_sxm", "status": "ok", "measured": measured}


def _diagnosis(run_id: str) -> list[str]:
    return [
        f"{run_id}: ok", "  ! ttft_ms.mean 49 is 1.2 times its prediction",
        "1. The KV cache is full for 30 % of the time [kv_exhausted]", "   - 12 preemptions",
        "   > free_gpu_memory_fraction 0.8 → 0.9", "     ttft_ms.mean 49 → 44",
    ]  # fmt: skip


def _ladder() -> Ladder:
    """Two steps, the coarser over the limit."""
    steps = []
    for rung, config, share in ((RUNGS[1], replace(CONFIG, quantization="bf16"), 1.0),
                                (RUNGS[2], CONFIG, 0.6)):  # fmt: skip
        values = {"weight_bytes_per_gpu": 15 * GIB * share, "kv_cache_tokens": 400_000.0,
                  "ttft_ms.mean": 70 * share, "tpot_ms.mean": 10 * share,
                  "e2el_ms.mean": 2300 * share, "output_tok_per_s": 1700.0}  # fmt: skip
        figures = {n: Figure(value=v, origin=Origin.PREDICTED) for n, v in values.items()}
        is_coarse = config is CONFIG
        steps.append(
            Step(rung=rung, config=config, engine="trtllm", figures=figures,
                 loss=LOSS if is_coarse else QualityLoss(), over_limit=is_coarse,
                 is_usable=not is_coarse)
        )  # fmt: skip
    return Ladder(model="a-model-8b", gpu="h100_sxm", workload="chat", steps=tuple(steps),
                  stopped_because="FP8 loses more than 0.5 %")  # fmt: skip


def validation(share: float) -> Validation:
    """Six runs, predicted at a share of what a poor calibration would say."""
    rows = []
    for index, clients in enumerate((1, 2, 4, 8, 16, 32)):
        measured = {
            "tpot_ms.mean": 4.0 + 0.2 * clients, "ttft_ms.mean": 40.0 + 9 * clients,
            "output_tok_per_s": 200.0 * clients,
        }  # fmt: skip
        predicted = {name: share * 1.06 * value for name, value in measured.items()}
        run = MeasuredRun(
            run_id=f"run-{index + 1}-of-{clients}-clients", gpu="h100_sxm", num_gpus=1,
            engine="trtllm", engine_version="1.2", model="a-model-8b",
            config={"max_batch_size": 256},
            workload={"protocol": "closed_loop", "concurrency": clients, "num_requests": 99,
                      "isl": 128, "osl": 128},
            measured=measured, folder=Path(),
        )  # fmt: skip
        intervals = {name: (0.9 * value, 1.1 * value) for name, value in predicted.items()}
        rows.append(Row(run=run, predicted=predicted, intervals=intervals, front_end_share=0.1))
    return Validation(rows=tuple(rows), skipped=())
