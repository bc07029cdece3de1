"""What a simulation found: times of every request, metrics, and the engine over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cost_models.frontend import FrontEndConstants
from cost_models.metrics import (
    PERCENTILES,
    LatencyLimits,
    RequestTimes,
    ServingMetrics,
    goodput_per_s,
    serving_metrics,
)
from planner.simulator.block_pool import PoolShape
from planner.simulator.gaps import gap_histogram
from planner.simulator.statistics import percentile_error, warm_up_length
from planner.simulator.step_log import StepLog

FEWEST_STEADY = 100
"""Requests from which rates are counted between arrivals."""

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineTrace:
    """What one scheduler did."""

    log: StepLog
    pool: PoolShape
    max_seq_len: int
    shares_prefixes: bool = False
    """Whether sequences read blocks in common, so that their tokens do not add up to blocks."""

    @property
    def can_count_waste(self) -> BoolArray:
        """Rows of the log in which blocks and cached tokens can be compared.

        Not while a prompt is computed, nor where sequences share blocks or keep a window.
        """
        alone = self.pool.windows == () and not self.shares_prefixes
        nothing_prefills: BoolArray = self.log.prompts == 0
        return nothing_prefills & alone

    @property
    def held_tokens(self) -> FloatArray:
        """Block space that sequences hold, row by row, in tokens."""
        pool = self.pool
        return self.log.used_units / max(pool.full_units, 1) * float(pool.tokens_per_block)

    @property
    def cached_tokens(self) -> FloatArray:
        """Tokens in that space, where nothing prefills."""
        return (self.log.context_tokens - self.log.decoding).astype(np.float64)

    @property
    def wasted_fraction(self) -> FloatArray:
        """Share of the pool that is held with no token in it, row by row; NaN if not countable."""
        capacity_tokens = self.pool.capacity / max(self.pool.full_units, 1)
        capacity_tokens *= self.pool.tokens_per_block
        wasted = (self.held_tokens - self.cached_tokens) / capacity_tokens
        return np.where(self.can_count_waste, wasted, np.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestColumns:
    """Every request by its index; times in seconds, NaN for refused requests."""

    arrival_s: FloatArray
    started_s: FloatArray
    """When its first chunk began to run."""
    first_token_s: FloatArray
    last_token_s: FloatArray
    isl: IntArray
    osl: IntArray
    max_tokens: IntArray
    """Output tokens that the client allows."""
    preemptions: IntArray
    cached_tokens: IntArray
    """Prompt tokens that block reuse found."""
    refusal: NDArray[np.int8]
    """Why the engine turned it away, as `planner.simulator.limits.Refusal`; 0 if it did not."""
    served_by: NDArray[np.int32]
    """Number of the scheduler instance in `SimulationResult.engines`; 0 for refused requests."""

    @property
    def refused(self) -> BoolArray:
        """Whether the engine turned the request away."""
        return self.refusal > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulationResult:
    """A whole simulated run of a deployment."""

    requests: RequestColumns
    engines: tuple[EngineTrace, ...]
    """One for each scheduler instance of each server."""
    pauses_s: FloatArray
    """Gaps between two tokens of a request that lay in a pause."""
    front_end: FrontEndConstants
    wall_s: float
    warm_up_requests: int = 0
    """First requests that the metrics leave out."""
    stands_for: int = 1
    """Servers that the simulated one stands for: like ones, each under the same share."""
    has_steady_state: bool = False
    """Whether requests stand for a service without an end, which has no last ones that run out."""
    tokens_per_step: float = 1.0
    """Mean tokens that an iteration yields for a sequence; logs count steps of one token."""

    @property
    def num_requests(self) -> int:
        """Requests sent."""
        return len(self.requests.arrival_s)

    @property
    def num_refused(self) -> int:
        """Requests that the engine turned away."""
        return int(self.requests.refused.sum())

    @property
    def num_steps(self) -> int:
        """Engine iterations in all."""
        return sum(self.steps_by_kind().values())

    @cached_property
    def served(self) -> NDArray[np.intp]:
        """Indices of the requests that the metrics count."""
        counted = ~self.requests.refused
        counted[: self.warm_up_requests] = False
        return np.flatnonzero(counted)

    @cached_property
    def times(self) -> RequestTimes:
        """Served requests, as measured ones are described; gaps are counted in `metrics`."""
        columns, rows = self.requests, self.served
        arrival_s = columns.arrival_s[rows]
        return RequestTimes(
            arrival_s=arrival_s,
            ttft_s=columns.first_token_s[rows] - arrival_s,
            e2el_s=columns.last_token_s[rows] - arrival_s,
            osl=columns.osl[rows],
            itl_s=np.zeros(0),
        )

    @property
    def queue_s(self) -> FloatArray:
        """From arrival to the first step that works on a request, front end included."""
        rows = self.served
        return self.requests.started_s[rows] - self.requests.arrival_s[rows]

    @cached_property
    def metrics(self) -> ServingMetrics:
        """Latencies and rates; every gap between tokens counts towards ITL."""
        since_s = float(self.times.arrival_s.min()) if self.served.size else 0.0
        pauses = [self.pauses_s, *(np.zeros(0) for _ in self.engines[1:])]
        gaps = [
            gap_histogram(trace.log, own, since_s=since_s)
            for trace, own in zip(self.engines, pauses, strict=True)
        ]
        merged = gaps[0]
        for other in gaps[1:]:
            merged.merge(other)
        itl = merged.smeared(self.front_end).distribution()
        found = replace(serving_metrics(self.times), itl_s=itl)
        return self._with_steady_rates(found) if self.has_steady_state else found

    def _with_steady_rates(self, found: ServingMetrics) -> ServingMetrics:
        """Return the rates of a service that never drains: what comes, as far as as much leaves.

        Both are counted from when the longest requests of the start have left.
        """
        times = self.times
        if times.arrival_s.size < FEWEST_STEADY:
            return found
        first_s, end_s = float(times.arrival_s.min()), float(times.arrival_s.max())
        begin_s = first_s + min(found.e2el_s.p99, (end_s - first_s) / 2)
        left_s = self.requests.last_token_s[~self.requests.refused]
        left = int(((left_s > begin_s) & (left_s <= end_s)).sum())
        came = int((times.arrival_s > begin_s).sum())
        all_s = self.requests.arrival_s[~self.requests.refused]
        coming_per_s = (all_s.size - 1) / float(all_s.max() - all_s.min())
        request_per_s = coming_per_s * min(left / came, 1.0)
        return replace(
            found,
            request_per_s=request_per_s,
            output_tok_per_s=request_per_s * float(times.osl.mean()),
        )

    def goodput_per_s(self, limits: LatencyLimits) -> float:
        """Return requests per second that keep every limit."""
        good_per_s = goodput_per_s(self.times, limits)
        if not self.has_steady_state or not good_per_s:
            return good_per_s
        drained_per_s = self.times.arrival_s.size / self.times.duration_s
        return good_per_s / drained_per_s * self.metrics.request_per_s

    def in_steady_state(self) -> SimulationResult:
        """Return the result as that of a service without an end.

        The first requests are left out of all metrics, by MSER-5, and rates are those at which
        requests end while others come.

        The rule looks at E2E latency per token, in order of arrival; for open loops only.
        """
        columns = self.requests
        served = ~columns.refused
        latency = columns.last_token_s[served] - columns.arrival_s[served]
        cut = warm_up_length(latency / columns.osl[served])
        warm_up = int(np.flatnonzero(served)[cut]) if cut else 0
        return replace(self, warm_up_requests=warm_up, has_steady_state=True)

    def of_speculation(self, osl: IntArray, *, tokens_per_step: float) -> SimulationResult:
        """Return the same of an engine whose iterations yield several tokens.

        Args:
            osl: Tokens that requests put out; in the simulation, steps stood for them.
            tokens_per_step: Mean tokens of an iteration.
        """
        requests = replace(self.requests, osl=osl)
        return replace(self, requests=requests, tokens_per_step=tokens_per_step)

    def percentile_errors(self, *, seed: int = 0) -> Mapping[str, Mapping[str, float]]:
        """Return the standard error in seconds of each percentile of TTFT, TPOT and E2EL."""
        rng = np.random.default_rng(seed)
        samples = {
            "ttft_s": self.times.ttft_s,
            "tpot_s": self.times.tpot_s,
            "e2el_s": self.times.e2el_s,
        }
        return {
            metric: {
                name: percentile_error(values, fraction, rng)
                for name, fraction in PERCENTILES.items()
            }
            for metric, values in samples.items()
        }

    @property
    def prefix_hit_fraction(self) -> float:
        """Share of prompt tokens that block reuse found in the cache."""
        total = int(self.requests.isl[self.served].sum())
        return float(self.requests.cached_tokens[self.served].sum()) / total if total else 0.0

    def steps_by_kind(self) -> dict[str, int]:
        """Return engine iterations that only decode, only prefill, and do both."""
        kinds = {"decode": 0, "prefill": 0, "mixed": 0}
        for trace in self.engines:
            log = trace.log
            prefills, decodes = log.prompts > 0, log.decoding > 0
            kinds["decode"] += int(log.steps[~prefills].sum())
            kinds["prefill"] += int(log.steps[prefills & ~decodes].sum())
            kinds["mixed"] += int(log.steps[prefills & decodes].sum())
        # An iteration beside a prompt yields as many tokens as others, counted as steps after it.
        beside = (self.tokens_per_step - 1) * kinds["mixed"]
        kinds["decode"] = round(max(kinds["decode"] - beside, 0.0) / self.tokens_per_step)
        return kinds

    def kv_usage(self) -> KvUsage:
        """Return how full the KV caches were, over the time in which the engines worked."""
        return KvUsage.of(self.engines)

    def token_times(self, index: int) -> FloatArray:
        """Return when the engine put out each token of a request that was never paused.

        Rebuilt from the step log; front-end streaming is left out.
        """
        delay_s = self.front_end.first_token_s
        first_s = self.requests.first_token_s[index] - delay_s
        outputs = self._outputs_s[int(self.requests.served_by[index])]
        # Streaming may have held the token up for a part of a step.
        start = int(np.searchsorted(outputs, first_s + 1e-9, side="right")) - 1
        return outputs[start : start + int(self.requests.osl[index])] + delay_s

    @cached_property
    def _outputs_s(self) -> list[FloatArray]:
        """When the tokens of every step left, for each engine."""
        return [np.concatenate(list(_outputs(trace.log))) for trace in self.engines]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUsage:
    """Occupancy of the KV cache, averaged over busy time."""

    mean_fraction: float
    """Share of the blocks that running sequences hold."""
    max_fraction: float
    waste_fraction: float
    """Share of the held blocks' space that has no token in it, while nothing prefills.

    NaN where sequences share blocks or keep a sliding window.
    """
    contiguous_saving_fraction: float
    """Memory that paging saves against max_seq_len tokens pre-allocated per running sequence."""

    @classmethod
    def of(cls, engines: tuple[EngineTrace, ...]) -> KvUsage:
        """Average over the steps of all engines, weighted by their time."""
        columns = zip(*(_kv_rows(trace) for trace in engines), strict=True)
        busy_s, counted_s, private_s, share, held, filled, contiguous = map(np.concatenate, columns)
        waste = 1.0 - _ratio(private_s @ filled, private_s @ held, empty=math.nan)
        saving = 1.0 - _ratio(counted_s @ held, counted_s @ contiguous, empty=1.0)
        return cls(
            mean_fraction=_ratio(busy_s @ share, busy_s.sum()),
            max_fraction=float(share.max(initial=0.0)),
            waste_fraction=waste,
            contiguous_saving_fraction=saving,
        )


def _kv_rows(trace: EngineTrace) -> tuple[FloatArray, ...]:
    """Return, row by row, times, the share of the pool held and three counts of tokens.

    The times are those in which the engine works, in which tokens can be counted (nothing
    prefills), and in which they add up to blocks. The tokens are those of block space held,
    those cached, and those of pre-allocated slots.
    """
    log, pool = trace.log, trace.pool
    counted = (log.prompts == 0) & (pool.windows == ())
    contiguous = log.decoding.astype(np.float64) * trace.max_seq_len
    busy_s = log.end_s - log.start_s
    counted_s = np.where(counted, busy_s, 0.0)
    private_s = np.where(trace.can_count_waste, busy_s, 0.0)
    share = log.used_units / pool.capacity
    return busy_s, counted_s, private_s, share, trace.held_tokens, trace.cached_tokens, contiguous


def _ratio(part: float, whole: float, *, empty: float = 0.0) -> float:
    return float(part / whole) if whole > 0 else empty


def _outputs(log: StepLog) -> Iterator[FloatArray]:
    """Yield when the tokens of every step left the engine."""
    for row in range(len(log.steps)):
        steps = int(log.steps[row])
        lengths = np.linspace(log.first_step_s[row], log.last_step_s[row], steps)
        ends = log.start_s[row] + np.cumsum(lengths)
        ends[-1] = log.end_s[row] + log.output_delay_s[row]
        yield ends
