"""What one configuration would do: metrics with intervals, memory, time per step, the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from cost_models.calibration import Provenance
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.gpu import GpuSpec
from cost_models.memory import MemoryPlan
from cost_models.speculation import AnyStep, Speculation, SpeculativeStep
from cost_models.step import StepBatch
from planner.estimator import ServingCurve, mean_kv_len, mixed_batch
from planner.prediction.evaluator import (
    Evaluation,
    Evaluator,
    Slice,
    with_chunk_gaps,
)
from planner.prediction.feasibility import violation
from planner.prediction.fusion import fusion_savings
from planner.prediction.intervals import (
    MEMORY_METRICS,
    Uncertainty,
    block_size_error,
    host_uncertainties,
    least_served,
    load_regime,
    probability_of_all,
    probability_within,
    upper_end,
    within_arrivals,
)
from planner.prediction.refusals import Refused, refusals_of
from planner.prediction.simulation import (
    SimulationSummary,
    operator_seconds,
    percentile_errors,
    request_limits,
    simulate_deployment,
    simulated_metrics,
)
from planner.quality import QUALITY_LOSS, QualityLoss
from planner.simulator import SimulationResult
from planner.workloads.demand import Demand
from planner.workloads.load import ArrivalMode, Load

BUSY_POWER_FRACTION = 0.85
"""Share of the board's power limit drawn by a GPU that serves at full load."""

IDLE_POWER_FRACTION = 0.20
"""Share of the board's power limit drawn between steps."""


UTILISATION = "utilisation"
"""Name of the load over the capacity among what a host's speed moves."""


class HostUncertainty(Enum):
    """How the doubt of a borrowed host enters intervals and probabilities."""

    LEFT_OUT = "left out"
    """Where they are not asked for."""
    CLOSED_FORM = "closed form"
    """In a moment; rough where queues build."""
    SIMULATED = "simulated"
    """By two more simulations, as the values are; where there is nothing to simulate, as above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A predicted number, its 90 % interval and where it comes from."""

    value: float
    interval_90: tuple[float, float]
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one deployment would do under a load."""

    deployment: Deployment
    metrics: Mapping[str, Metric]
    """By the metric's name in a measured run, for example `ttft_ms.p99`."""
    memory: MemoryPlan
    step_time_breakdown: Mapping[str, Mapping[str, float]]
    """Seconds by operator family, for a `decode` step and a `mixed` one."""
    fusion_savings: Mapping[str, Mapping[str, float]]
    """Seconds that fused kernels save such steps, by chain of operators."""
    slo_excess: Mapping[str, float]
    """Predicted over allowed, less 1, by SLO metric or quality; at the risk that is taken."""
    slo_probability: Mapping[str, float]
    """Probability that each limit of the SLO holds, by metric; its metric's interval tells it."""
    highest_rate_per_s: float
    """Highest request rate that meets the SLO; 0 where none does."""
    refused_share: float
    """Share of the requests that the engine turns away."""
    front_end_share: float
    """Share of the front end's time that the load takes; 1 means it limits the rate."""
    regime: str
    """Kind of load that decides how sure this is, as `load_regime` names it."""
    binding_limit: str
    """What stops this configuration from serving more."""
    refusals: tuple[Refused, ...] = ()
    """What turns requests away, and what would take them; the commonest first."""
    quality: QualityLoss = field(default_factory=QualityLoss)
    """What its precisions are expected to lose."""
    simulation: SimulationResult | None = None
    """The run behind latencies and rates; None where they come from the closed form."""
    time_by_operator: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the simulated run by operator family."""
    speculation: Speculation | None = None
    """What is drafted and how much of it is right; None where nothing is."""

    @property
    def config(self) -> EngineConfig:
        """What the engine of each server is told."""
        return self.deployment.config

    @property
    def fits(self) -> bool:
        """Whether the configuration fits the GPU's memory."""
        return bool(self.memory.fits)

    @property
    def meets_slo(self) -> bool:
        """Whether every limit of the SLO holds at the predicted value."""
        return all(excess <= 0 for excess in self.slo_excess.values())

    @property
    def probability(self) -> float:
        """Probability that it keeps the whole SLO; 0 where it does not fit or refuses prompts."""
        if not self.fits or self.refused_share > 0:
            return 0.0
        return probability_of_all(self.slo_probability.values())

    @property
    def violation(self) -> float:
        """How far it is from feasible (`planner.prediction.feasibility`); 0 if it is."""
        short = self.memory.shortfall_bytes / self.memory.total_bytes
        excess = self.slo_excess
        return float(violation(shortfall=short, refused_share=self.refused_share, excess=excess))

    @property
    def feasible(self) -> bool:
        """Whether it fits, takes every prompt and meets the SLO."""
        return self.fits and self.meets_slo and self.refused_share == 0

    def value(self, metric: str) -> float:
        """Return a metric's predicted value."""
        if metric == QUALITY_LOSS:
            return self.quality.loss_pct
        return self.metrics[metric].value

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "num_gpus": self.deployment.num_gpus,
            "num_servers": self.deployment.num_servers,
            "config": config_to_json(self.deployment),
            "predicted": {
                name: {
                    "value": _rounded(metric.value),
                    "interval_90": [_rounded(bound) for bound in metric.interval_90],
                    "provenance": str(metric.provenance),
                }
                for name, metric in self.metrics.items()
            },
            "quality": self.quality.to_json(),
            "memory": memory_to_json(self.memory),
            "step_time_breakdown": _rounded_steps(self.step_time_breakdown),
            "fusion_savings": _rounded_steps(self.fusion_savings),
            "highest_rate_per_s": _rounded(self.highest_rate_per_s),
            "slo_excess": {name: _rounded(value) for name, value in self.slo_excess.items()},
            "slo_probability": {
                "all": _rounded(self.probability),
                "by_limit": {name: _rounded(p) for name, p in self.slo_probability.items()},
            },
            "binding_limit": self.binding_limit,
            "refused_share": _rounded(self.refused_share),
            "refusals": [refused.to_json() for refused in self.refusals],
            "speculation": _speculation_to_json(self.speculation),
            "simulation": (
                SimulationSummary.of(self.simulation).to_json()
                | {
                    "time_by_operator": {
                        family: _rounded(seconds)
                        for family, seconds in self.time_by_operator.items()
                    }
                }
                if self.simulation
                else None
            ),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What comes of a deployment under a load."""

    evaluation: Evaluation
    memory: MemoryPlan
    simulation: SimulationResult | None
    values: Mapping[str, float]
    """Every metric by name."""
    refusals: tuple[Refused, ...] = ()
    """What the simulated engines turned away."""

    @property
    def refused_share(self) -> float:
        """Share of the requests that the engine turns away: as simulated, else by lengths."""
        if self.refusals or self.simulation is not None:
            return sum(refused.share for refused in self.refusals)
        return float(self.evaluation.refused_share[0])

    @property
    def utilisation(self) -> float:
        """Load over the rate that can be sustained."""
        return float(self.evaluation.utilisation[0])

    @property
    def front_end_share(self) -> float:
        """Share of the front end's time that the load takes; 1 means it limits the rate."""
        return float(self.evaluation.front_end_share[0])


def predict_deployment(
    evaluator: Evaluator,
    deployment: Deployment,
    demand: Demand | None = None,
    *,
    host: HostUncertainty = HostUncertainty.SIMULATED,
    simulation: SimulationResult | None = None,
    whole_fleet: bool = True,
) -> Prediction:
    """Return the full prediction of one deployment.

    Args:
        evaluator: Model, GPU, calibration, load and SLO.
        deployment: What serves.
        demand: Requests to simulate; without them, or where the model does not fit, latencies
            and rates come from the closed form.
        host: How the doubt of a borrowed host is carried through the prediction.
        simulation: Of this demand, where it was made before.
        whole_fleet: Simulate all servers, also where one can stand for all.
    """
    config = deployment.config
    outcome = outcome_of(evaluator, deployment, demand, simulation, whole_fleet=whole_fleet)
    values, evaluation, simulation = outcome.values, outcome.evaluation, outcome.simulation
    point = evaluator.curve(config).at(max(_decoding(evaluator, deployment, values), 1.0))
    step, batches = evaluator.step_model(config), step_batches(evaluator, config, point)
    target = step.verify if isinstance(step, SpeculativeStep) else step
    regime = load_regime(str(evaluator.load.protocol), outcome.utilisation)
    breakdown = {name: step_seconds(step, batch) for name, batch in batches.items()}
    hosts = _host_uncertainties(evaluator, deployment, outcome, demand, host)
    metrics = _within_arrivals(
        _metrics(evaluator, config, outcome, hosts, breakdown["decode"], regime=regime),
        capacity=_least_capacity(evaluator, config, outcome, hosts),
        arriving_per_s=_arriving_per_s(evaluator.load, demand),
    )
    prediction = Prediction(
        deployment=deployment,
        metrics=metrics,
        memory=outcome.memory,
        step_time_breakdown=breakdown,
        fusion_savings={name: fusion_savings(target, batch) for name, batch in batches.items()},
        slo_excess=_slo_excess(evaluator, metrics) | evaluator.quality_excess(config),
        slo_probability={
            name: probability_within(limit, metrics[name].value, metrics[name].interval_90)
            for name, limit in evaluator.slo.items()
        },
        highest_rate_per_s=float(evaluation.highest_rate_per_s[0]),
        refused_share=outcome.refused_share,
        refusals=outcome.refusals,
        front_end_share=outcome.front_end_share,
        regime=regime,
        binding_limit="",
        quality=evaluator.quality_of(config),
        simulation=simulation,
        time_by_operator=operator_seconds(simulation, step) if simulation else {},
        speculation=evaluator.speculation(config),
    )
    slots = float(evaluation.slots[0])
    return replace(prediction, binding_limit=_binding_limit(prediction, point, slots))


def outcome_of(
    evaluator: Evaluator,
    deployment: Deployment,
    demand: Demand | None,
    simulation: SimulationResult | None = None,
    *,
    whole_fleet: bool = True,
) -> Outcome:
    """Return what comes of a deployment: all that a fit compares.

    Intervals and shares of operators, which `predict_deployment` adds, take longer than a short
    simulation.
    """
    config = deployment.config
    evaluation = evaluator.evaluate(Slice(base=deployment))
    memory = single(evaluation.memory)
    refusals: tuple[Refused, ...] = ()
    if demand is not None and memory.fits:
        if simulation is None:
            simulation = simulate_deployment(
                evaluator,
                deployment,
                memory,
                demand,
                residence_s=float(evaluation.metrics["e2el_ms.mean"][0]) / 1e3,
                whole_fleet=whole_fleet,
            )
        refusals = refusals_of(simulation)
        simulation = simulation if simulation.served.size else None
    values = _closed_form(evaluator, evaluation)
    if demand is not None and simulation is not None:
        limits = request_limits(evaluator.slo)
        values |= simulated_metrics(simulation, demand, limits)
        values |= with_chunk_gaps(values, evaluator.tokens_per_chunk(config))
    values |= _economy(evaluator.gpu, deployment.num_gpus, evaluation, values)
    return Outcome(
        evaluation=evaluation,
        memory=memory,
        simulation=simulation,
        values=values,
        refusals=refusals,
    )


def _slo_excess(evaluator: Evaluator, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return predicted over allowed, less 1, at the risk that is taken."""
    return evaluator.slo_excess(
        {
            name: upper_end(metrics[name].value, metrics[name].interval_90[1], evaluator.risk)
            for name in evaluator.slo
        }
    )


def step_batches(
    evaluator: Evaluator, config: EngineConfig, point: ServingCurve
) -> dict[str, StepBatch]:
    """Return what a decode and a mixed step work on."""
    load = evaluator.load_of(config)
    decode = StepBatch(decode_sequences=point.decoding, decode_kv_len=mean_kv_len(load))
    mixed = mixed_batch(load, decoding=point.decoding, prompts=point.prompts_per_mixed_step)
    return {"decode": decode, "mixed": mixed}


def step_seconds(step: AnyStep, batch: StepBatch) -> dict[str, float]:
    """Return seconds by operator family."""
    return {family: float(seconds) for family, seconds in step.iteration(batch).by_family.items()}


_REFUSES = "max_num_tokens: prompts longer than a step are refused without chunked prefill"


def _binding_limit(  # noqa: PLR0911  one return for each limit, in order of precedence
    prediction: Prediction, point: ServingCurve, slots: float
) -> str:
    """Say in words what stops a configuration from serving more."""
    if not prediction.fits:
        return f"memory: {prediction.memory.binding}"
    if prediction.refused_share > 0:
        return str(prediction.refusals[0]) if prediction.refusals else _REFUSES
    worst = max(prediction.slo_excess.items(), key=lambda item: item[1], default=None)
    if worst is not None and worst[1] > 0:
        return f"SLO {worst[0]}"
    if prediction.front_end_share > 0.95:
        return "front end: one process handles all requests"
    if float(point.decoding) >= 0.95 * slots:
        by_kv = slots < prediction.config.max_batch_size
        return "KV-cache capacity" if by_kv else "max_batch_size"
    if worst is not None and worst[1] > -0.15:
        return f"SLO {worst[0]}"
    return _busiest(point, prediction.step_time_breakdown)


def _busiest(point: ServingCurve, breakdown: Mapping[str, Mapping[str, float]]) -> str:
    share = float(point.mixed_share)
    total = {
        family: (1 - share) * seconds + share * breakdown["mixed"].get(family, 0.0)
        for family, seconds in breakdown["decode"].items()
    }
    family = max(total, key=lambda name: total[name])
    return f"step time: {family} takes {100 * total[family] / sum(total.values()):.0f} %"


def _decoding(evaluator: Evaluator, deployment: Deployment, values: Mapping[str, float]) -> float:
    """Sequences that decode in one scheduler instance under the load: rate x time in decode."""
    decode_s = values["tpot_ms.mean"] * 1e-3 * max(evaluator.load.osl.mean - 1, 0.0)
    decoding = values["request_per_s"] * decode_s
    return decoding / (deployment.config.num_instances * deployment.num_servers)


def _closed_form(evaluator: Evaluator, evaluation: Evaluation) -> dict[str, float]:
    """Return every metric by name, without a simulation."""
    values = {name: float(column[0]) for name, column in evaluation.metrics.items()}
    values["goodput_request_per_s"] = _goodput(evaluator, values)
    memory = single(evaluation.memory)
    return values | {name: float(getattr(memory, name)) for name in sorted(MEMORY_METRICS)}


def _metrics(
    evaluator: Evaluator,
    config: EngineConfig,
    outcome: Outcome,
    hosts: Mapping[str, Uncertainty],
    decode_step: Mapping[str, float],
    *,
    regime: str,
) -> dict[str, Metric]:
    calibration = evaluator.calibration
    provenance = evaluator.provenance_of(config)
    chance = percentile_errors(outcome.simulation) if outcome.simulation else {}
    share = decode_step.get("attention_decode", 0.0) / sum(decode_step.values())
    metrics = {}
    for name, value in outcome.values.items():
        block = block_size_error(name, config, calibration, attention_share=share)
        doubt = replace(
            hosts.get(name, Uncertainty()), chance=math.hypot(chance.get(name, 0.0), block)
        )
        interval = evaluator.interval(name, value, config, regime=regime, doubt=doubt)
        metrics[name] = Metric(value=value, interval_90=interval, provenance=provenance)
    return metrics


def _within_arrivals(
    metrics: Mapping[str, Metric],
    *,
    capacity: float,
    arriving_per_s: float,
) -> dict[str, Metric]:
    """Return the metrics with intervals that end where everything is served that comes."""
    served_per_s = metrics["request_per_s"].value
    room = max(arriving_per_s / served_per_s, 1.0) if served_per_s > 0 else math.inf
    least, latency = 0.0, metrics["e2el_ms.mean"]
    if math.isfinite(room):
        slower = latency.interval_90[1] / latency.value
        least = least_served(room=room, capacity=capacity, latency=slower)
    return {
        name: replace(
            metric,
            interval_90=within_arrivals(
                name, metric.value, metric.interval_90, room=room, least=least
            ),
        )
        for name, metric in metrics.items()
    }


def _least_capacity(
    evaluator: Evaluator, config: EngineConfig, outcome: Outcome, hosts: Mapping[str, Uncertainty]
) -> float:
    """Return the low end of the highest rate that can be sustained, over the load.

    Clients that wait for answers are served at the machine's capacity: it errs as their rate does.
    """
    slower = Uncertainty(below=hosts[UTILISATION].above) if UTILISATION in hosts else Uncertainty()
    regime = str(ArrivalMode.CLOSED_LOOP)
    low, _ = evaluator.interval("request_per_s", 1.0, config, regime=regime, doubt=slower)
    return low / outcome.utilisation if outcome.utilisation > 0 else math.inf


def _arriving_per_s(load: Load, demand: Demand | None) -> float:
    """Return the requests per second that come on their own clock; no bound in other loads."""
    if load.protocol is not ArrivalMode.OPEN_LOOP:
        return math.inf
    drawn_per_s = math.inf if demand is None else demand.arriving_per_s
    return drawn_per_s if math.isfinite(drawn_per_s) else float(np.max(load.rate_per_s))


def _host_uncertainties(
    evaluator: Evaluator,
    deployment: Deployment,
    outcome: Outcome,
    demand: Demand | None,
    how: HostUncertainty,
) -> dict[str, Uncertainty]:
    """Return what a host that no run has shown leaves open; nothing where one has."""
    hosts = evaluator.hosts()
    if not hosts or how is HostUncertainty.LEFT_OUT:
        return {}
    if how is HostUncertainty.CLOSED_FORM and outcome.simulation is not None:
        outcome, demand = outcome_of(evaluator, deployment, None), None
    whole = outcome.simulation is None or outcome.simulation.stands_for == 1
    ends = (outcome_of(end, deployment, demand, whole_fleet=whole) for end in hosts)
    return host_uncertainties(
        *(dict(one.values) | {UTILISATION: one.utilisation} for one in (outcome, *ends))
    )


def _goodput(evaluator: Evaluator, values: Mapping[str, float]) -> float:
    """Requests per second that meet every limit, were each metric log-normal."""
    share = 1.0
    for name, limit in evaluator.slo.items():
        metric = name.split(".")[0]
        share = min(share, _share_within(limit, values[f"{metric}.p50"], values[f"{metric}.p99"]))
    return values["request_per_s"] * share


def _share_within(limit: float, median: float, p99: float) -> float:
    spread = math.log(max(p99 / median, 1.0 + 1e-6)) / 2.326348
    return 0.5 * (1 + math.erf(math.log(limit / median) / spread / math.sqrt(2)))


def _economy(
    gpu: GpuSpec, num_gpus: int, evaluation: Evaluation, values: Mapping[str, float]
) -> dict[str, float]:
    tokens_per_s = values["output_tok_per_s"]
    busy = min(float(evaluation.utilisation[0]), 1.0)
    power_fraction = IDLE_POWER_FRACTION + (BUSY_POWER_FRACTION - IDLE_POWER_FRACTION) * busy
    watts = num_gpus * gpu.tdp_w * power_fraction
    usd_per_s = num_gpus * gpu.usd_per_hour / 3600
    return {
        "output_tok_per_s_per_gpu": tokens_per_s / num_gpus,
        "usd_per_million_output_tokens": (
            usd_per_s / tokens_per_s * 1e6 if tokens_per_s > 0 else math.inf
        ),
        "output_tokens_per_joule": tokens_per_s / watts,
    }


def single(memory: MemoryPlan) -> MemoryPlan:
    """Return a one-row memory plan with scalars instead of arrays."""
    values = {
        name: np.asarray(value).reshape(-1)[0].item() if name != "layout" else value
        for name, value in ((f, getattr(memory, f)) for f in memory.__dataclass_fields__)
    }
    return MemoryPlan(**values)


def config_to_json(deployment: Deployment) -> dict[str, Any]:
    """Return the engine's configuration with the servers and GPUs of the deployment.

    `num_replicas` is the number of servers: each runs one replica of the model.
    """
    return engine_config_to_json(deployment.config) | {
        "num_replicas": deployment.num_servers,
        "num_gpus": deployment.num_gpus,
        "router": deployment.router,
    }


def engine_config_to_json(config: EngineConfig) -> dict[str, Any]:
    """Return what the engine of one server is told, with the GPUs that it takes."""
    return asdict(config) | {
        "num_gpus": config.num_gpus,
        "moe_tensor_parallel_size": config.moe_tensor_parallel_size,
    }


def _speculation_to_json(speculation: Speculation | None) -> dict[str, Any] | None:
    if speculation is None:
        return None
    acceptance = speculation.acceptance
    return {
        "tokens_per_step": _rounded(speculation.tokens_per_step),
        "rows_per_sequence": _rounded(speculation.rows_per_sequence),
        "acceptance": [_rounded(chance) for chance in acceptance.conditional],
        "draft_rate": _rounded(acceptance.draft_rate),
        "is_prior": acceptance.is_prior,
        "source": acceptance.source,
    }


def memory_to_json(memory: MemoryPlan) -> dict[str, Any]:
    """Return the memory plan of one configuration in bytes and counts."""
    names = (
        "total_bytes",
        "weight_bytes_per_gpu",
        "kv_cache_bytes_per_gpu",
        "kv_cache_tokens",
        "kv_cache_blocks",
        "max_sequences",
        "activation_bytes_per_gpu",
        "cuda_graph_bytes_per_gpu",
        "communication_bytes_per_gpu",
        "runtime_bytes_per_gpu",
        "reserved_bytes_per_gpu",
        "free_bytes_per_gpu",
        "shortfall_bytes",
    )
    plain = {name: round(float(getattr(memory, name))) for name in names}
    return plain | {"kv_bytes_per_token": memory.layout.bytes_per_token, "fits": bool(memory.fits)}


def _rounded_steps(
    steps: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float | None]]:
    return {
        step: {name: _rounded(seconds) for name, seconds in parts.items()}
        for step, parts in steps.items()
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
