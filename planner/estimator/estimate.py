"""From a serving curve and a load to TTFT, TPOT, E2E latency and throughput."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.frontend import FrontEndConstants
from cost_models.metrics import PERCENTILES
from planner.estimator.curve import ServingCurve
from planner.estimator.queueing import GammaQuantiles, multi_server_wait
from planner.estimator.statistics import Statistics
from planner.workloads.load import ArrivalMode, Load

FloatArray = NDArray[np.float64]

DEFAULT_WAVES = 10.0
"""Requests per client in a closed loop that does not say how many it sends."""

OVERLOAD_REQUESTS = 1000.0
"""Requests of an open loop without an end, over which the backlog of an overload is averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """How many servers share a load, and what bounds each. Arrays broadcast over configurations."""

    num_servers: ArrayLike = 1
    """Each has a front end of its own, and gets the same share of the requests."""
    instances: int = 1
    """Scheduler instances of each server, in step: attention-DP ranks x pipeline stages."""
    max_sequences: ArrayLike
    """Sequences that one instance can hold: the batch limit or the KV cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted metrics of a deployment; latencies in seconds by statistic."""

    ttft_s: Mapping[str, FloatArray]
    tpot_s: Mapping[str, FloatArray]
    itl_s: Mapping[str, FloatArray]
    e2el_s: Mapping[str, FloatArray]
    request_per_s: FloatArray
    """Completed requests of the whole deployment."""
    output_tok_per_s: FloatArray
    decoding: FloatArray
    """Mean sequences that decode in one scheduler instance."""
    utilisation: FloatArray
    """Load over the rate that the servers can sustain."""
    front_end_share: FloatArray
    """Share of each front end's time that the load takes; 1 means it limits the rate."""


def estimate(
    curve: ServingCurve, load: Load, servers: Servers, front_end: FrontEndConstants
) -> Estimate:
    """Return the metrics of one curve under a load, for an array of servers.

    In an open loop `load.rate_per_s` may be an array too.
    """
    model = _Instance(curve, load, front_end, servers)
    if load.protocol is ArrivalMode.OPEN_LOOP:
        return model.open_loop()
    if load.protocol is ArrivalMode.CLOSED_LOOP:
        return model.closed_loop()
    return model.offline()


class _Instance:
    """One scheduler instance under its share of the load; methods work on arrays of servers.

    Requests that are dealt in turn to n instances reach each with n gaps between them: where the
    gaps have a squared coefficient of variation c², their sums have c²/n.
    """

    def __init__(
        self,
        curve: ServingCurve,
        load: Load,
        front_end: FrontEndConstants,
        servers: Servers,
    ) -> None:
        self.curve, self.load, self.front_end = curve, load, front_end
        self.num_servers, slots = np.broadcast_arrays(
            np.asarray(servers.num_servers, dtype=np.float64),
            np.asarray(servers.max_sequences, dtype=np.float64),
        )
        self.slots, self.instances = np.maximum(slots, 1.0), float(servers.instances)
        self.in_all = self.num_servers * self.instances
        """Instances of all servers."""
        self.arrival_cv2 = load.arrival_cv**2 / self.in_all
        self.decode_tokens = max(load.osl.mean - 1, 0.0)
        clients = load.concurrency / self.num_servers if load.concurrency else np.inf
        streams = np.minimum(self.slots * self.instances, clients)
        serial_s = front_end.least_request_s(load.isl.mean, load.osl.mean, streams)
        endless = np.full_like(serial_s, np.inf)
        self.front_end_rate = np.divide(1.0, serial_s, out=endless, where=serial_s > 0)
        """Requests/s that the front end of one server can take."""
        self.arrival_work_s = front_end.request_s + load.isl.mean * front_end.prompt_token_s

    def open_loop(self) -> Estimate:
        """Little's law finds the batch at which the instance keeps up with its arrivals."""
        rate = np.asarray(self.load.rate_per_s, dtype=np.float64) / self.in_all
        most = np.minimum(self.curve.rate_at(self.slots), self.front_end_rate / self.instances)
        served = np.minimum(rate, most)
        decoding = np.minimum(np.interp(served, *_increasing(self.curve)), self.slots)
        point = self.curve.at(decoding)
        service = self._service_s(point) + self.decode_tokens * point.tpot_s
        utilisation = rate / most
        variability = (self.arrival_cv2 + self.load.osl.cv**2) / 2
        slot_wait = multi_server_wait(
            utilisation=np.minimum(utilisation, 0.999),
            servers=self.slots,
            service_s=service,
            variability=variability,
        )
        slot_wait = np.where(utilisation < 1, slot_wait, self._backlog_s(rate, most))
        prefill_wait = self._prefill_wait_s(point, served)
        wait = slot_wait + prefill_wait
        ttft = self._ttft(point, mean_wait=wait, wait_variance=slot_wait**2 + 2 * prefill_wait**2)
        return self._result(point, ttft=ttft, rate=served * self.in_all, utilisation=utilisation)

    def closed_loop(self) -> Estimate:
        """Clients that outnumber the slots wait for one; the start is a burst."""
        clients = self.load.concurrency / self.in_all
        slots = np.maximum(np.minimum(self.slots, clients) - self.front_end.slot_lag, 1.0)
        residents = self.curve.decoding + self.curve.rate_per_s * self._service_s(self.curve)
        decoding = np.interp(np.minimum(slots, clients), residents, self.curve.decoding)
        point = self.curve.at(decoding)
        rate = np.minimum(point.rate_per_s, self.front_end_rate / self.instances)
        residence = self._service_s(point) + self.decode_tokens * point.tpot_s
        slot_wait = np.maximum(clients / rate - residence, 0.0)
        burst = self._burst(point, np.minimum(slots, clients))
        waves = self.load.num_requests / self.load.concurrency if self.load.num_requests else 0.0
        first_wave = 1.0 / max(waves or DEFAULT_WAVES, 1.0)
        ttft = self._ttft(point, mean_wait=slot_wait, wait_variance=(slot_wait / 4) ** 2)
        ttft = _with_burst(ttft, burst, first_wave)
        total = clients / (ttft["mean"] + self.decode_tokens * point.tpot_s) * self.in_all
        return self._result(
            point, ttft=ttft, rate=total, utilisation=np.asarray(clients / slots, np.float64)
        )

    def offline(self) -> Estimate:
        """A full batch until the queue is empty, then a batch that drains."""
        requests = (self.load.num_requests or 10 * self.slots * self.in_all) / self.in_all
        point = self.curve.at(np.minimum(self.slots, requests))
        rate = np.minimum(point.rate_per_s, self.front_end_rate / self.instances)
        drain = self.decode_tokens * self.curve.tpot_at(np.minimum(self.slots, requests) / 2)
        total_s = requests / rate + drain / 2
        burst = np.maximum(total_s - self.decode_tokens * point.tpot_s, 0.0)
        ttft = self._ttft(point, mean_wait=np.zeros_like(burst), wait_variance=np.zeros_like(burst))
        ttft = _with_burst(ttft, burst, 1.0)
        return self._result(
            point, ttft=ttft, rate=requests / total_s * self.in_all, utilisation=np.ones_like(rate)
        )

    def _service_s(self, point: ServingCurve) -> FloatArray:
        """Time from arrival to first token when a slot is free: lag, step, prefill, front end."""
        lag = (self.front_end.steps_in_flight - 1) * point.tpot_s
        streams = self.front_end.active_stream_s * point.decoding * self.instances
        host = self.arrival_work_s + self.front_end.first_token_s + streams
        return np.asarray(point.step_wait_s + lag + point.prefill_s + host, dtype=np.float64)

    def _prefill_wait_s(self, point: ServingCurve, rate: FloatArray) -> FloatArray:
        """Wait behind other prompts: an M/G/1 queue of prefills (Pollaczek and Khinchine)."""
        work = point.prefill_s
        busy = np.minimum(rate * work / np.maximum(point.prompts_per_mixed_step, 1.0), 0.98)
        spread = (self.arrival_cv2 + self.load.isl.cv**2) / 2
        return np.asarray(busy / (1 - busy) * work * spread, dtype=np.float64)

    def _backlog_s(self, rate: FloatArray, most: FloatArray) -> FloatArray:
        """Mean wait over a run in which requests come faster than they are served."""
        requests = (self.load.num_requests or OVERLOAD_REQUESTS) / self.in_all
        return np.asarray(requests / 2 * np.maximum(1 / most - 1 / rate, 0.0), dtype=np.float64)

    def _burst(self, point: ServingCurve, clients: FloatArray) -> FloatArray:
        """Time until the last prompt of a simultaneous start has its first token."""
        per_prompt = point.mixed_step_s / np.maximum(point.prompts_per_mixed_step, 1e-9)
        increment = per_prompt - point.decode_step_s / np.maximum(point.prompts_per_mixed_step, 1.0)
        return np.asarray(clients * np.maximum(increment, 0.0), dtype=np.float64)

    def _ttft(
        self, point: ServingCurve, *, mean_wait: FloatArray, wait_variance: FloatArray
    ) -> Statistics:
        service = self._service_s(point)
        mean = service + mean_wait
        length_sd = point.prefill_s * self.load.isl.cv
        variance = wait_variance + length_sd**2 + point.step_wait_s**2 / 3
        return Statistics(mean, GammaQuantiles(mean, variance))

    def _tpot(self, point: ServingCurve) -> Statistics:
        """Requests differ in how many mixed steps they meet."""
        jump = point.mixed_step_s - point.decode_step_s
        share = point.mixed_share
        tokens = max(self.decode_tokens, 1.0)
        variance = jump**2 * share * (1 - share) / tokens
        if self.load.protocol is ArrivalMode.OPEN_LOOP:
            swing = self._batch_swing(point)
            variance = variance + swing**2
        return Statistics(point.tpot_s, GammaQuantiles(point.tpot_s, variance))

    def _batch_swing(self, point: ServingCurve) -> FloatArray:
        """Standard deviation of TPOT as the batch breathes with the arrivals.

        What arrivals gain in evenness by being dealt in turn, the batch gains as far as service
        times are equal: Var N = E N (1 + (c² − 1) E[min(S, S')]/E[S]), the peakedness of heavy
        traffic (Whitt, AT&T Bell Laboratories Technical Journal 63, 1984), in which E[min]/E is 1
        for equal times and 1/2 for exponential ones.
        """
        equal = 1.0 / (1.0 + self.load.osl.cv**2)
        evened = 1.0 - equal * (1.0 - 1.0 / self.in_all)
        spread = np.sqrt(point.decoding * evened) * self.load.arrival_cv
        upper_s = self.curve.tpot_at(np.minimum(point.decoding + spread, self.slots))
        return np.asarray(np.maximum(upper_s - point.tpot_s, 0.0), dtype=np.float64)

    def _itl(self, point: ServingCurve) -> Statistics:
        """Gaps are decode steps, or mixed steps in the share that prefills."""

        def quantile(name: str) -> FloatArray:
            mixes = 1 - PERCENTILES[name] < point.mixed_share
            return np.where(mixes, point.mixed_step_s, point.decode_step_s)

        return Statistics(point.tpot_s, quantile)

    def _e2el(self, ttft: Statistics, tpot_s: FloatArray) -> Statistics:
        """First token, and as many more as the output has."""

        def quantile(name: str) -> FloatArray:
            typical = ttft["mean"] if self.load.osl.cv else ttft[name]
            return typical + max(self.load.osl.quantiles[name] - 1, 0.0) * tpot_s

        return Statistics(ttft["mean"] + self.decode_tokens * tpot_s, quantile)

    def _result(
        self,
        point: ServingCurve,
        *,
        ttft: Statistics,
        rate: FloatArray,
        utilisation: FloatArray,
    ) -> Estimate:
        return Estimate(
            ttft_s=ttft,
            tpot_s=self._tpot(point),
            itl_s=self._itl(point),
            e2el_s=self._e2el(ttft, point.tpot_s),
            request_per_s=rate,
            output_tok_per_s=rate * self.load.osl.mean,
            decoding=point.decoding,
            utilisation=utilisation,
            front_end_share=np.minimum(rate / (self.front_end_rate * self.num_servers), 1.0),
        )


def _increasing(curve: ServingCurve) -> tuple[FloatArray, FloatArray]:
    """Rates and batch sizes as `np.interp` wants them: the rate strictly increasing from 0."""
    nudge = 1e-12 * np.arange(curve.rate_per_s.size)
    rates = np.concatenate([[0.0], curve.rate_per_s * (1 + nudge)])
    return rates, np.concatenate([[0.0], curve.decoding])


def _with_burst(ttft: Statistics, burst_s: FloatArray, share: float) -> Statistics:
    """Mix the first wave, whose wait is uniform up to `burst_s`, with the steady state."""

    def quantile(name: str) -> FloatArray:
        in_burst = PERCENTILES[name] - (1 - share)
        if in_burst <= 0:
            return ttft[name]
        return np.maximum(ttft[name], ttft["mean"] + burst_s * in_burst / share)

    return Statistics(ttft["mean"] + share * burst_s / 2, quantile)
