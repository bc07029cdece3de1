"""Predicts many configurations of one model on one GPU under one load, in closed form.

Configurations come as slices: all rows of a slice share the knobs that shape the
operators (precision, parallel sizes), and differ in limits that only the scheduler and
the memory model see. What rows share (step model, weights, serving curve) is made once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cost_models.acceptance import Acceptance, believed
from cost_models.calibration import Calibration, Provenance
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.frontend import FrontEndConstants
from cost_models.gpu import GpuSpec
from cost_models.memory import MemoryKnobs, MemoryModel, MemoryPlan
from cost_models.metrics import PERCENTILES, chunk_gap
from cost_models.model import ModelSpec
from cost_models.precision import kv_dtype, quantization
from cost_models.profile_io import load_model
from cost_models.speculation import (
    AnyStep,
    Speculation,
    speculation_of,
    speculative_step,
)
from cost_models.step import StepModel
from planner.estimator import Estimate, Servers, ServingCurve, decode_steps, estimate, serving_curve
from planner.prediction.intervals import (
    HOST_Q95,
    NEAR_CAPACITY,
    NORMAL_Q95,
    TOLD_BY_ACCEPTANCE,
    Uncertainty,
    host_uncertainties,
    interval_90,
    load_regime,
    upper_end,
)
from planner.quality import QUALITY_LOSS, QualityLoss, QualityTable
from planner.workloads.load import ArrivalMode, Load

FloatArray = NDArray[np.float64]
Value = TypeVar("Value", float, FloatArray)

INNER_KNOBS = (
    "max_batch_size",
    "max_num_tokens",
    "tokens_per_block",
    "free_gpu_memory_fraction",
    "enable_chunked_prefill",
    "enable_block_reuse",
    "capacity_scheduler_policy",
    "cuda_graph_max_batch_size",
)
"""Knobs of the engine that may differ between the rows of a slice; so may `num_servers`."""

CURVE_KNOBS = (
    "max_num_tokens",
    "enable_chunked_prefill",
    "enable_block_reuse",
    "cuda_graph_max_batch_size",
)
"""Inner knobs that change the serving curve."""

STEP_KNOBS = ("cuda_graph_max_batch_size",)
"""Inner knobs that change the cost of a step."""

FAR_OVER = 1e6
"""Excess over a limit beyond which it is all one."""

RATE_STEPS = 0.99
"""Share of a curve point's rate at which the highest rate is probed: below saturation."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """Deployments that share everything but some inner knobs."""

    base: Deployment
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Values of the inner knobs that differ, one row a deployment; may be empty."""

    def __len__(self) -> int:
        """Return the number of deployments."""
        return len(next(iter(self.columns.values()), (None,)))

    def column(self, knob: str) -> NDArray[Any]:
        """Return a knob's value in every row."""
        values = self.columns.get(knob)
        return np.full(len(self), self.base.knob(knob)) if values is None else values

    @property
    def num_gpus(self) -> NDArray[np.int64]:
        """GPUs of every row."""
        return self.base.config.num_gpus * self.column("num_servers")

    def deployment(self, row: int) -> Deployment:
        """Return one row as a deployment."""
        return self.base.with_knobs(**{k: _plain(v[row]) for k, v in self.columns.items()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """Predictions for the rows of a slice. Metric names are those of a measured run."""

    metrics: Mapping[str, FloatArray]
    memory: MemoryPlan
    slots: FloatArray
    """Sequences that one scheduler instance can hold at once."""
    utilisation: FloatArray
    front_end_share: FloatArray
    refused_share: FloatArray
    """Share of prompts longer than the engine takes."""
    highest_rate_per_s: FloatArray
    """Highest request rate of the deployment that meets the SLO; 0 where none does."""
    slo_excess: Mapping[str, FloatArray]
    """Predicted over allowed, less 1, by SLO metric or quality; 0 or less meets it."""
    saturated_tok_per_s_per_gpu: FloatArray
    """Output tokens/s per GPU when every slot is taken."""
    saturated_tok_per_s_per_user: FloatArray
    """Speed that one user sees then: 1 / TPOT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Results of the rows that share a curve."""

    index: NDArray[np.intp]
    estimate: Estimate
    highest_rate_per_s: FloatArray
    saturated: ServingCurve
    slo_metrics: Mapping[str, FloatArray]
    """At the risk that is taken."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluator:
    """Closed-form predictions of one model, GPU, engine and load."""

    model: ModelSpec
    gpu: GpuSpec
    calibration: Calibration
    load: Load
    slo: Mapping[str, float]
    """Limits in the units of the metric's name, for example `{"ttft_ms.p99": 500}`."""
    risk: float = 0.0
    """Limits must hold at the upper end of the interval of 1 - risk; 0 is the value itself."""
    quality: QualityTable = field(default_factory=QualityTable)
    max_quality_loss_pct: float | None = None
    """A limit beside the SLO; None is none."""
    _steps: dict[EngineConfig, AnyStep] = field(default_factory=dict, repr=False)
    _decodes: dict[EngineConfig, FloatArray] = field(default_factory=dict, repr=False)
    _curves: dict[EngineConfig, ServingCurve] = field(default_factory=dict, repr=False)
    _hosts: list[Evaluator] = field(default_factory=list, repr=False)

    def under(self, load: Load) -> Evaluator:
        """Return the evaluator of another load; nothing made for this one is kept."""
        return replace(self, load=load, _steps={}, _decodes={}, _curves={}, _hosts=[])

    def at_rate(self, rate_per_s: float) -> Evaluator:
        """Return the evaluator of an open loop at another rate, on which no curve depends."""
        return replace(self, load=replace(self.load, rate_per_s=rate_per_s))

    def calibrated(self, calibration: Calibration) -> Evaluator:
        """Return the same under another calibration."""
        return replace(self, calibration=calibration, _steps={}, _decodes={}, _curves={}, _hosts=[])

    def hosts(self) -> tuple[Evaluator, ...]:
        """Return the same at the fast and the slow end of 90 % of the hosts that it may run on.

        None where a run has shown the host. They judge by the value itself, whatever the risk.
        """
        if not self.calibration.borrows_host:
            return ()
        if not self._hosts:
            for factor in (1.0 / HOST_Q95, HOST_Q95):
                self._hosts.append(self.calibrated(self.calibration.with_slower_host(factor)))
        return tuple(replace(host, load=self.load, slo=self.slo, risk=0.0) for host in self._hosts)

    def evaluate(self, rows: Slice, *, with_highest_rate: bool = True) -> Evaluation:
        """Return the predictions for every row of a slice."""
        memory = self.memory(rows)
        slots = self._slots(rows, memory)
        num_servers = rows.column("num_servers")
        parts: list[_Part] = []
        for index, config in self._curve_groups(rows):
            curve = self.curve(config)
            servers = Servers(
                num_servers=num_servers[index],
                instances=config.num_instances,
                max_sequences=slots[index],
            )
            result = self._estimate(config, servers, self.load_of(config))
            highest = (
                self._highest_rate(curve, config, servers, result)
                if with_highest_rate
                else np.zeros(len(index))
            )
            parts.append(
                _Part(
                    index=index,
                    estimate=result,
                    highest_rate_per_s=highest,
                    saturated=curve.at(np.maximum(slots[index], 1.0)),
                    slo_metrics=self._at_risk(result, config, servers, self.load_of(config)),
                )
            )
        return self._assembled(rows, memory, slots, parts)

    def step_model(self, config: EngineConfig) -> AnyStep:
        """Return the step model of a configuration; those of equal shape share one."""
        key = self._curve_key(config, STEP_KNOBS)
        if key not in self._steps:
            self._steps[key] = self._new_step_model(key)
        return self._steps[key]

    def _new_step_model(self, config: EngineConfig) -> AnyStep:
        speculation = self.speculation(config)
        if speculation is None:
            return StepModel(
                model=self.model, config=config, gpu=self.gpu, calibration=self.calibration
            )
        return speculative_step(
            speculation,
            model=self.model,
            config=config,
            gpu=self.gpu,
            calibration=self.calibration,
        )

    def speculation(self, config: EngineConfig) -> Speculation | None:
        """Return what a configuration drafts of this load's text; None where it does not.

        Raises:
            PlannerError: The draft model is not named, or cannot be read.
        """
        acceptance = self.acceptance(config)
        if acceptance is None:
            return None
        name = config.speculative_model
        drafts_alone = config.decoding_type == "DraftTarget" and name
        return speculation_of(
            config,
            model=self.model,
            engine=self.calibration.traits,
            acceptance=acceptance,
            draft_model=_draft_model(name) if drafts_alone else None,
        )

    def acceptance(self, config: EngineConfig) -> Acceptance | None:
        """Return what is believed of a configuration's drafts; None where it has none."""
        if not config.speculates:
            return None
        kind, known = config.decoding_type, self.load.acceptances
        in_runs = self.calibration.acceptances.get(f"{self.model.name}/{kind}")
        return believed(kind, known) if kind in known or in_runs is None else in_runs

    def tokens_per_step(self, config: EngineConfig) -> float:
        """Return the tokens that one step yields for a sequence, on average."""
        speculation = self.speculation(config)
        return speculation.tokens_per_step if speculation else 1.0

    def acceptance_log_error(self, config: EngineConfig) -> float:
        """Return half the width, in log, of the 90 % interval of the tokens that a step yields.

        0 where nothing is drafted, or where the text told how often drafts are right.
        """
        acceptance = self.acceptance(config)
        if acceptance is None:
            return 0.0
        low, high = (
            acceptance.shifted(share).tokens_per_step(config.max_draft_len) for share in (-1, 1)
        )
        return math.log(high / low) / 2

    def tokens_per_chunk(self, config: EngineConfig) -> float:
        """Return the tokens that a client gets at a time, on average."""
        return config.stream_interval * self.tokens_per_step(config)

    def curve(self, config: EngineConfig) -> ServingCurve:
        """Return the serving curve of a configuration; those of equal budget share one."""
        key = self._curve_key(config, CURVE_KNOBS)
        if key not in self._curves:
            self._curves[key] = serving_curve(
                self.step_model(config),
                self.load_of(config),
                decode_s=self._decode_steps(config),
                config=config,
                lockstep=self._keeps_waves(config),
            )
        return self._curves[key]

    def _keeps_waves(self, config: EngineConfig) -> bool:
        """Whether requests that start together end together: not where luck with drafts decides."""
        alike = self.load.is_lockstep and not config.speculates
        return alike and self.calibration.front_end.keeps_waves

    def _decode_steps(self, config: EngineConfig) -> FloatArray:
        key = self._curve_key(config, STEP_KNOBS)
        if key not in self._decodes:
            self._decodes[key] = decode_steps(self.step_model(config), self.load)
        return self._decodes[key]

    def _curve_groups(self, rows: Slice) -> list[tuple[NDArray[np.intp], EngineConfig]]:
        """Group rows that share a serving curve: (row numbers, one of their configurations)."""
        base = rows.base.config
        columns = {knob: rows.column(knob) for knob in self._seen(base, CURVE_KNOBS)}
        graphs, batches = columns["cuda_graph_max_batch_size"], rows.column("max_batch_size")
        pairs = list(zip(graphs.tolist(), batches.tolist(), strict=True))
        felt = {pair: self._effective_graph_size(base, *pair) for pair in set(pairs)}
        columns["cuda_graph_max_batch_size"] = np.array([felt[pair] for pair in pairs])
        keys = list(zip(*(column.tolist() for column in columns.values()), strict=True))
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
        return [
            (np.array(members), rows.deployment(members[0]).config) for members in groups.values()
        ]

    def _curve_key(self, config: EngineConfig, knobs: tuple[str, ...]) -> EngineConfig:
        """Return the configuration with only those inner knobs that matter to a curve."""
        bare = replace(config, **_kept(EngineConfig(), INNER_KNOBS), **_SCHEDULED)
        key = replace(bare, **_kept(config, self._seen(config, knobs)))
        felt = self._effective_graph_size(
            config, config.cuda_graph_max_batch_size, config.max_batch_size
        )
        return replace(key, cuda_graph_max_batch_size=felt)

    def _effective_graph_size(self, base: EngineConfig, graphs: int, batch: int) -> int:
        """Return up to which batch graphs are felt.

        Those that cover the whole batch are all alike, unless steps with prompts are replayed in
        pieces up to the largest of them.
        """
        if not self.calibration.step.piecewise_max_tokens:
            return EngineConfig().max_batch_size if graphs >= batch else graphs
        config = replace(base, cuda_graph_max_batch_size=graphs, max_batch_size=batch)
        return self.calibration.traits.largest_graph_tokens(config)

    def _seen(self, config: EngineConfig, knobs: tuple[str, ...]) -> tuple[str, ...]:
        """Add the block size where the engine's decode kernel feels it."""
        felt = self.calibration.step.attention_decode_fp8_block_gain
        on_fp8 = kv_dtype(config.kv_cache_dtype).attention_dtype == "fp8"
        return (*knobs, "tokens_per_block") if felt and on_fp8 else knobs

    def memory(self, rows: Slice) -> MemoryPlan:
        """Return how every row divides the GPU's memory."""
        traits, base = self.calibration.traits, rows.base.config
        num_pieces = len(traits.captured_pieces(base))
        graphs = {
            int(size): num_pieces
            + len(traits.captured_batch_sizes(replace(base, cuda_graph_max_batch_size=int(size))))
            for size in np.unique(rows.column("cuda_graph_max_batch_size"))
        }
        knobs = MemoryKnobs(
            max_batch_size=rows.column("max_batch_size"),
            max_num_tokens=rows.column("max_num_tokens"),
            max_seq_len=base.max_seq_len or self.model.max_position_embeddings,
            tokens_per_block=rows.column("tokens_per_block"),
            kv_fraction=rows.column(traits.memory_knob),
            kv_cache_max_tokens=base.kv_cache_max_tokens,
            num_cuda_graphs=np.array(
                [graphs[int(size)] for size in rows.column("cuda_graph_max_batch_size")]
            ),
        )
        return self._memory_model(base).plan(knobs)

    def _memory_model(self, base: EngineConfig) -> MemoryModel:
        speculation = self.speculation(base)
        return MemoryModel(
            model=self.model,
            config=base,
            gpu=self.gpu,
            engine=self.calibration.traits,
            constants=self.calibration.memory,
            draft=speculation.draft if speculation else None,
        )

    def front_end(self, config: EngineConfig) -> FrontEndConstants:
        """Return the front end as a configuration streams through it."""
        speculation = self.speculation(config)
        constants = self.calibration.front_end
        if speculation and speculation.is_synchronous:
            constants = replace(constants, steps_in_flight=1)
        return constants.with_tokens_per_chunk(self.tokens_per_chunk(config))

    def load_of(self, config: EngineConfig) -> Load:
        """Return the load as a configuration sees it: without block reuse no prefix is shared."""
        if config.enable_block_reuse:
            return self.load
        return replace(self.load, reusable_prefix_tokens=0.0)

    def _slots(self, rows: Slice, memory: MemoryPlan) -> FloatArray:
        """Sequences that an instance holds: its batch limit, or its share of the KV cache.

        GUARANTEED_NO_EVICT reserves prompt and `max_output_tokens` for each;
        MAX_UTILIZATION takes blocks as sequences grow, so they hold half their output
        on average. A prefix that all share is stored once.
        """
        load, base = self.load, rows.base.config
        shared = np.where(rows.column("enable_block_reuse"), load.reusable_prefix_tokens, 0.0)
        policy = rows.column("capacity_scheduler_policy")
        grows = np.isin(policy, GROWING_POLICIES)
        output = np.where(grows, load.osl.mean / 2, load.max_output_tokens)
        tokens = np.maximum(load.isl.mean - shared + output, 1.0)
        per_sequence = memory.layout.sequence_bytes(tokens, rows.column("tokens_per_block"))
        prefix = memory.layout.sequence_bytes(shared, rows.column("tokens_per_block"))
        room = np.maximum(memory.kv_cache_bytes_per_gpu - prefix, 0.0)
        held = np.floor(room / per_sequence / base.pipeline_parallel_size)
        slots = np.minimum(held, rows.column("max_batch_size"))
        # A static batch runs until its longest output ends.
        drained = load.osl.mean / max(load.osl.quantiles["p99"], 1.0)
        static = policy == "STATIC_BATCH"
        return np.asarray(np.where(static, np.maximum(slots * drained, 1.0), slots), np.float64)

    def _refused(self, rows: Slice, memory: MemoryPlan) -> FloatArray:
        """Share of the requests that the engine refuses, by the percentiles of their lengths.

        It refuses prompts that leave no room below `max_seq_len`, those longer than a step's
        tokens where they are not chunked, and what the whole KV cache cannot hold.
        """
        base = rows.base.config
        max_seq_len = base.max_seq_len or self.model.max_position_embeddings
        chunked = rows.column("enable_chunked_prefill")
        one_step = np.where(chunked, np.inf, rows.column("max_num_tokens"))
        held = memory.kv_cache_tokens / base.num_instances
        cached = np.where(held < max_seq_len, held - self.load.max_output_tokens, np.inf)
        return self._share_longer(np.minimum(np.minimum(one_step, max_seq_len - 1.0), cached))

    def _share_longer(self, budget: FloatArray) -> FloatArray:
        """Share of the prompts that are longer than a number of tokens."""
        isl = self.load.isl
        longer = np.zeros(budget.shape)
        for name, probability in PERCENTILES.items():
            longer = np.maximum(longer, np.where(isl.quantiles[name] > budget, 1 - probability, 0))
        longer = np.where((longer == 0) & (isl.maximum > budget), 0.005, longer)
        return np.where(isl.quantiles["p50"] > budget, 1.0, longer)

    def _highest_rate(
        self, curve: ServingCurve, config: EngineConfig, servers: Servers, at_load: Estimate
    ) -> FloatArray:
        """Walk up the curve until the SLO breaks; one row per set of servers."""
        load = self.load_of(config)
        if load.protocol is not ArrivalMode.OPEN_LOOP:
            met = _meets(self.slo_excess(self._at_risk(at_load, config, servers, load)))
            return np.where(met, at_load.request_per_s, 0.0)
        num_servers = np.asarray(servers.num_servers, dtype=np.float64)[:, None]
        slots = np.asarray(servers.max_sequences, dtype=np.float64)[:, None]
        batches = np.minimum(curve.decoding[None, :], slots)
        rates = RATE_STEPS * curve.rate_at(batches) * num_servers * config.num_instances
        probe = replace(load, rate_per_s=rates)
        wide = replace(servers, num_servers=num_servers, max_sequences=slots)
        result = self._estimate(config, wide, probe)
        excess = self.slo_excess(self._at_risk(result, config, wide, probe))
        worst = np.maximum.reduce([np.full(rates.shape, -np.inf), *excess.values()])
        return _crossing(rates, worst)

    def _estimate(self, config: EngineConfig, servers: Servers, load: Load) -> Estimate:
        return estimate(self.curve(config), load, servers, self.front_end(config))

    def _at_risk(
        self, result: Estimate, config: EngineConfig, servers: Servers, load: Load
    ) -> dict[str, FloatArray]:
        """Return the SLO's metrics of an estimate at the upper end of the interval of 1 - risk.

        What the closed form knows of it: residuals, drafts and the host's doubt.
        """
        chunk_tokens = self.tokens_per_chunk(config)
        values = _metrics(result, chunk_tokens, self.slo)
        if not self.risk:
            return values
        hosts = (host._estimate(config, servers, load) for host in self.hosts())
        doubts = host_uncertainties(
            values, *(_metrics(end, chunk_tokens, self.slo) for end in hosts)
        )
        is_near = result.utilisation >= NEAR_CAPACITY
        found = {}
        for name, value in values.items():
            near, far = (
                self.interval(
                    name, value, config, regime=regime, doubt=doubts.get(name, Uncertainty())
                )
                for regime in (load_regime(str(load.protocol), share) for share in (1.0, 0.0))
            )
            found[name] = upper_end(value, np.where(is_near, near[1], far[1]), self.risk)
        return found

    def interval(
        self, name: str, value: Value, config: EngineConfig, *, regime: str, doubt: Uncertainty
    ) -> tuple[Value, Value]:
        """Return the 90 % interval of a metric: residuals, drafts, and what else is in doubt.

        Args:
            name: Metric.
            value: Its prediction, or one for each of many configurations like this one.
            config: What is deployed.
            regime: Kind of load, as `load_regime` names it.
            doubt: Of the simulation, the block size and the host.
        """
        if name.split(".", maxsplit=1)[0] in TOLD_BY_ACCEPTANCE:
            drafts = self.acceptance_log_error(config) / NORMAL_Q95
            doubt = replace(doubt, chance=math.hypot(doubt.chance, drafts))
        return interval_90(
            name, value, self.calibration, self.provenance_of(config), regime=regime, doubt=doubt
        )

    def provenance_of(self, config: EngineConfig) -> Provenance:
        """Return `calibrated` only if every operator that weighs was fitted or served here."""
        unseen = operators_used(config, self.model) - self.calibration.seen_operators
        borrows = any(operator in self.calibration.borrowed for operator in unseen)
        return Provenance.DATASHEET if borrows else self.calibration.provenance

    def slo_excess(self, metrics: Mapping[str, Value]) -> dict[str, Value]:
        """Return predicted / allowed - 1 for each metric of the SLO."""
        return {name: metrics[name] / limit - 1.0 for name, limit in self.slo.items()}

    @property
    def limits(self) -> dict[str, float]:
        """Every limit by metric: the SLO's, and that on the loss of quality."""
        if self.max_quality_loss_pct is None:
            return dict(self.slo)
        return dict(self.slo) | {QUALITY_LOSS: self.max_quality_loss_pct}

    def quality_of(self, config: EngineConfig) -> QualityLoss:
        """Return what a configuration's precisions are expected to lose."""
        return self.quality.loss(config.quantization, config.kv_cache_dtype)

    def quality_excess(self, config: EngineConfig) -> dict[str, float]:
        """Return how far a configuration is beyond the limit on quality, if there is one."""
        if self.max_quality_loss_pct is None:
            return {}
        loss = self.quality_of(config)
        return {QUALITY_LOSS: loss.excess(self.max_quality_loss_pct, self.risk)}

    def _quality_excess(self, rows: Slice) -> dict[str, FloatArray]:
        return {
            name: np.full(len(rows), excess)
            for name, excess in self.quality_excess(rows.base.config).items()
        }

    def _assembled(
        self,
        rows: Slice,
        memory: MemoryPlan,
        slots: FloatArray,
        parts: list[_Part],
    ) -> Evaluation:
        size = len(rows)
        metrics: dict[str, FloatArray] = {}
        at_risk = {name: np.zeros(size) for name in self.slo}
        utilisation, share, highest, saturated, user_speed = np.zeros((5, size))
        chunk_tokens = self.tokens_per_chunk(rows.base.config)
        for part in parts:
            for name, values in _metrics(part.estimate, chunk_tokens).items():
                metrics.setdefault(name, np.zeros(size))[part.index] = values
            for name, values in part.slo_metrics.items():
                at_risk[name][part.index] = values
            utilisation[part.index] = part.estimate.utilisation
            share[part.index] = part.estimate.front_end_share
            highest[part.index] = part.highest_rate_per_s
            saturated[part.index] = part.saturated.rate_per_s
            user_speed[part.index] = 1.0 / part.saturated.tpot_s
        config = rows.base.config
        metrics["output_tok_per_s_per_gpu"] = metrics["output_tok_per_s"] / rows.num_gpus
        return Evaluation(
            metrics=metrics,
            memory=memory,
            slots=slots,
            utilisation=utilisation,
            front_end_share=share,
            refused_share=self._refused(rows, memory),
            highest_rate_per_s=highest,
            slo_excess=self.slo_excess(at_risk) | self._quality_excess(rows),
            saturated_tok_per_s_per_gpu=saturated
            * (config.num_instances / config.num_gpus)
            * self.load.osl.mean,
            saturated_tok_per_s_per_user=user_speed,
        )


GROWING_POLICIES = ("MAX_UTILIZATION", "RECOMPUTE")
"""Capacity policies that take blocks as sequences grow; vLLM's is called RECOMPUTE here."""


ESTIMATED = (
    *(
        f"{name}_ms.{statistic}"
        for name in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", *PERCENTILES)
    ),
    "output_tok_per_s",
    "request_per_s",
)
"""What an estimate tells, by the names of a measured run."""


def _metrics(
    result: Estimate, tokens_per_chunk: float, names: Iterable[str] = ESTIMATED
) -> dict[str, FloatArray]:
    """Name the estimate's values as a measured run does, latencies in milliseconds."""
    return {name: _metric(result, tokens_per_chunk, name) for name in names}


def _metric(result: Estimate, tokens_per_chunk: float, name: str) -> FloatArray:
    metric, _, statistic = name.partition("_ms.")
    if not statistic:
        return np.asarray(getattr(result, name))
    seconds = getattr(result, f"{metric}_s")
    value = np.asarray(seconds[statistic] * 1e3)
    if metric != "itl":
        return value
    return chunk_gap(value, mean_gap=seconds["mean"] * 1e3, tokens_per_chunk=tokens_per_chunk)


def with_chunk_gaps(metrics: Mapping[str, Value], tokens_per_chunk: float) -> dict[str, Value]:
    """Return ITL as a client sees it: gaps between chunks, by the metric's name."""
    mean_gap = metrics["itl_ms.mean"]
    return {
        name: chunk_gap(gap, mean_gap=mean_gap, tokens_per_chunk=tokens_per_chunk)
        for name, gap in metrics.items()
        if name.startswith("itl_ms.")
    }


@cache
def _draft_model(name: str) -> ModelSpec:
    return load_model(name)


def _crossing(rates: FloatArray, excess: FloatArray) -> FloatArray:
    """Return, row by row, the rate up to which the excess stays at or below 0; 0 where nowhere.

    Between the last rate that meets the limits and the next, the excess is a straight line.
    """
    last = np.where(excess <= 0, np.arange(rates.shape[1]), -1).max(axis=1)
    row, low = np.arange(len(rates)), np.maximum(last, 0)
    high = np.minimum(low + 1, rates.shape[1] - 1)
    # Of what is far over its limit, only that it is over counts.
    below, above = (np.clip(excess[row, at], -FAR_OVER, FAR_OVER) for at in (low, high))
    crosses = (below < 0) & (above > 0)
    share = np.divide(-below, above - below, out=np.zeros_like(below), where=crosses)
    rate = rates[row, low] + share * (rates[row, high] - rates[row, low])
    return np.where(last < 0, 0.0, rate)


def _meets(excess: Mapping[str, FloatArray]) -> NDArray[np.bool_]:
    met = [value <= 0 for value in excess.values()] or [np.array(True)]
    return np.asarray(np.logical_and.reduce(met), dtype=np.bool_)


_SCHEDULED: Mapping[str, Any] = {
    "max_seq_len": 0,
    "stream_interval": 1,
    "context_chunking_policy": "FIRST_COME_FIRST_SERVED",
    "queue_order": "FIRST_COME_FIRST_SERVED",
    "enable_partial_reuse": True,
    "host_cache_size": 0,
}
"""Knobs that neither operators nor curves see, at one value."""


def _kept(config: EngineConfig, knobs: tuple[str, ...]) -> dict[str, Any]:
    return {knob: getattr(config, knob) for knob in knobs}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def operators_used(config: EngineConfig, model: ModelSpec) -> set[str]:
    """Return `family/dtype` of the operators that weigh."""
    row = quantization(config.quantization)
    gemm = "bfloat16" if row.experts_only else row.gemm_dtype
    kv_table = kv_dtype(config.kv_cache_dtype).attention_dtype
    used = {f"gemm/{gemm}"}
    if model.uses_mla:
        used |= {f"mla_prefill/{kv_table}", f"mla_decode/{kv_table}"}
    else:
        used |= {f"attention_prefill/{kv_table}", f"attention_decode/{kv_table}"}
    if model.is_moe:
        used.add(f"moe/{row.moe_dtype}")
    return used
