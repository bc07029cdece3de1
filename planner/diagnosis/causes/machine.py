"""The machine: a GPU that was slowed, shared, stalled or left idle, and a client that was late."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cost_models.errors import PlannerError
from engines.registry import DEFAULT_ENGINE, find_engine, is_engine
from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import RATES, Effect, Finding, Remedy
from planner.diagnosis.prospect import Prospect, prospect_of, ratios
from planner.diagnosis.remedies import SHOWN
from planner.workloads.measured import MeasuredRun

LOWERED_LIMIT = 0.95
"""Power limit over the board's own below which somebody has lowered it."""

IDLE = 0.1
"""Share of the time with requests in which the GPU did nothing from which the host is slow.

Less comes from the run's ramp and from the sampling of NVML's utilization.
"""

BUSY_FRONT_END = 0.8
"""Share of the front end's time from which it limits the rate."""

LEAST_LEFT = 0.01
"""Least ratio that is said to be left of a metric."""


def throttled(case: RunCase) -> Finding | None:
    """Clocks were lowered for heat or by the hardware, or the power limit is below the board's."""
    limit, board = case.reading("power_limit_w"), _board_power_w(case)
    is_capped = bool(limit and board and limit < LOWERED_LIMIT * board)
    if "throttled" not in case.flags and not is_capped:
        return None
    clock, top = case.reading("sm_clock_mhz"), case.reading("max_sm_clock_mhz")
    prospect = case.simulated
    fraction = clock / top if clock and top else 1.0
    slowed = prospect.with_clock(fraction) if prospect else None
    reasons = case.machine.get("throttle_fraction") or {}
    evidence = [f"SM clock {clock:.0f} of {top:.0f} MHz on average"] if clock and top else []
    evidence += [f"{name} in {100 * share:.0f} % of the samples" for name, share in reasons.items()]
    if is_capped:
        evidence.append(f"power limit {limit:.0f} W, the board's own is {board:.0f} W")
    return Finding(
        cause="throttled",
        words="the GPU was throttled",
        evidence=tuple(evidence),
        remedies=(
            Remedy(
                knob="",
                action=f"nvidia-smi -pl {board:.0f}"
                if is_capped
                else "cool the GPU, measure again",
                effects=_measured_effects(case, ratios(slowed, prospect.base))
                if slowed and prospect
                else (),
            ),
        ),
        ratios=ratios(slowed, prospect.base) if slowed and prospect else {},
        is_foreseen=False,
    )


def shared_gpu(case: RunCase) -> Finding | None:
    """Somebody else's memory was on the GPU before the engine started."""
    if "shared_gpu" not in case.flags:
        return None
    return Finding(
        cause="shared_gpu",
        words="another process used the GPU: its share of every time is not known",
        evidence=("over 1 GiB was in use before the engine started",),
        remedies=(Remedy(knob="", action="end the other process and measure again"),),
        is_foreseen=False,
    )


def stalled(case: RunCase) -> Finding | None:
    """The whole engine was silent for a while in which requests waited."""
    if "stalled" not in case.flags or case.log is None:
        return None
    start_s, end_s = case.log.longest_silence()
    first_s, later_s = case.log.waiting_during(start_s, end_s)
    served = case.log.served
    to_first_s = float((case.log.first_token_s - case.log.arrival_s)[served].sum())
    to_later_s = float((case.log.last_token_s - case.log.first_token_s)[served].sum())
    left = {
        "ttft_ms.mean": _left(first_s, to_first_s),
        "tpot_ms.mean": _left(later_s, to_later_s),
        "e2el_ms.mean": _left(first_s + later_s, to_first_s + to_later_s),
        "output_tok_per_s": 1 / _left(end_s - start_s, case.log.length_s),
    }
    return Finding(
        cause="stalled",
        words="the engine stalled",
        evidence=(
            f"nothing came for {1e3 * (end_s - start_s):.0f} ms from second {start_s:.1f} on",
            f"{first_s + later_s:.1f} request-seconds were waited through, of "
            f"{to_first_s + to_later_s:.1f} in all",
        ),
        remedies=(
            Remedy(
                knob="",
                action="measure again after a warm-up that covers these batch sizes",
                effects=_measured_effects(case, left),
            ),
        ),
        ratios=left,
        is_foreseen=False,
    )


def client_limited(case: RunCase) -> Finding | None:
    """The load generator was late itself, so times are partly its own."""
    client = case.record.get("client") or {}
    if case.failed:
        return None
    if "client_limited" not in case.flags and not client.get("limited"):
        return None
    lag_ms = float((client.get("loop_lag_ms") or {}).get("p99") or 0.0)
    late_ms = float((client.get("late_send_ms") or {}).get("p99") or 0.0)
    cpu = float(client.get("cpu_fraction") or 0.0)
    ttft, tpot = (case.measured.get(f"{name}_ms.mean", 0.0) for name in ("ttft", "tpot"))
    left = {}
    if ttft:
        left["ttft_ms.mean"] = _left(lag_ms + late_ms, ttft)
    if tpot:
        left["tpot_ms.mean"] = _left(lag_ms, tpot)
    return Finding(
        cause="client_limited",
        words="the client limited the run: its own delay is in the times",
        evidence=(
            f"its event loop lagged by {lag_ms:.1f} ms (P99), requests left {late_ms:.1f} ms late",
            f"it used {100 * cpu:.0f} % of a core",
        ),
        remedies=(
            Remedy(
                knob="",
                action="run the client on cores of its own, or another host",
                effects=_measured_effects(case, left),
            ),
        ),
        ratios=left,
        is_foreseen=False,
    )


def host_bound(case: RunCase) -> Finding | None:
    """The GPU waited for the host while requests were in flight."""
    busy, log = case.reading("busy_fraction"), case.log
    if busy is None or log is None or not log.length_s:
        return None
    at_work = log.busy_s / log.length_s
    left = min(busy / at_work, 1.0)
    if 1 - left < IDLE:
        return None
    kept_busy = {
        name: 1 / left if name in RATES else left
        for name in ("tpot_ms.mean", "itl_ms.mean", "e2el_ms.mean", "e2el_ms.p50", *sorted(RATES))
    }
    return Finding(
        cause="host_bound",
        words="host-bound: the GPU waits for the CPU between steps",
        evidence=(
            f"the GPU was busy {100 * busy:.0f} % of the time, requests were in flight "
            f"{100 * at_work:.0f} %",
            *_front_end_words(case),
        ),
        remedies=(_less_host_work(case, kept_busy), *_another_engine(case)),
        ratios=kept_busy,
        is_foreseen=False,
    )


def front_end(case: RunCase) -> Finding | None:
    """One process handles all requests and tokens, and it is at its limit."""
    prospect = case.simulated
    if prospect is None:
        return None
    share = prospect.base.front_end_share
    if share < BUSY_FRONT_END:
        return None
    knobs = {"stream_interval": 4 * prospect.config.stream_interval}
    relieved = prospect.with_knobs(**knobs)
    return Finding(
        cause="front_end",
        words="the front end is at its limit: one process takes all requests and tokens",
        evidence=(f"{100 * share:.0f} % of its time is taken (predicted)",),
        remedies=(
            Remedy(
                knob=case.knob("stream_interval"),
                action=case.turn("stream_interval", prospect.config.stream_interval, 4),
                effects=_predicted_effects(prospect, ratios(prospect.base, relieved)),
            ),
        )
        if relieved
        else (Remedy(knob=_workers(case.engine), action="more front-end processes"),),
        ratios=ratios(prospect.base, relieved) if relieved else {},
    )


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "throttled": throttled,
    "shared_gpu": shared_gpu,
    "stalled": stalled,
    "client_limited": client_limited,
    "host_bound": host_bound,
    "front_end": front_end,
}


def _workers(engine: str) -> str:
    """Return what takes work off the process that also schedules; empty where nothing does."""
    return find_engine(engine).front_end_option if is_engine(engine) else ""


def _left(lost: float, whole: float) -> float:
    return max(1 - lost / whole, LEAST_LEFT) if whole else 1.0


def _board_power_w(case: RunCase) -> float:
    return case.prospect.evaluator.gpu.tdp_w if case.prospect else 0.0


def _measured_effects(case: RunCase, left: Mapping[str, float]) -> tuple[Effect, ...]:
    """Return what the measured metrics would be without a cause."""
    return tuple(
        Effect(metric=name, before=case.measured[name], after=case.measured[name] * left[name])
        for name in SHOWN
        if name in left and case.measured.get(name)
    )


def _predicted_effects(prospect: Prospect, left: Mapping[str, float]) -> tuple[Effect, ...]:
    values = ((name, prospect.base.value(name)) for name in SHOWN if name in left)
    return tuple(Effect(metric=n, before=v, after=v * left[n]) for n, v in values)


def _front_end_words(case: RunCase) -> tuple[str, ...]:
    prospect = case.simulated
    if prospect is None:
        return ()
    share = 100 * prospect.base.front_end_share
    return (f"the load takes {share:.0f} % of the front end's time (predicted)",)


def _less_host_work(case: RunCase, left: Mapping[str, float]) -> Remedy:
    knob = _workers(case.engine)
    return Remedy(
        knob=knob,
        action=f"{knob} 2" if knob else "an engine that schedules the next step beside this one",
        effects=_measured_effects(case, left),
        note="at most: were the GPU kept busy",
    )


def _another_engine(case: RunCase) -> tuple[Remedy, ...]:
    """What TensorRT-LLM would do with the same requests, where the run's engine has no model."""
    if is_engine(case.engine):
        return ()
    try:
        prospect = prospect_of(_on_trtllm(case.run))
    except PlannerError:
        return ()
    predicted = prospect.base
    return (
        Remedy(
            knob="backend",
            action="TensorRT-LLM instead",
            effects=tuple(
                Effect(metric=name, before=case.measured[name], after=predicted.value(name))
                for name in SHOWN
                if case.measured.get(name)
            ),
            note="the same requests and limits",
        ),
    )


def _on_trtllm(run: MeasuredRun) -> MeasuredRun:
    """Return a run as if TensorRT-LLM had served it."""
    return MeasuredRun(
        run_id=run.run_id,
        gpu=run.gpu,
        num_gpus=run.num_gpus,
        engine=DEFAULT_ENGINE,
        engine_version="",
        model=run.model,
        config=run.config,
        workload=run.workload,
        measured={},
        folder=run.folder,
    )
