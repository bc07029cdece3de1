"""Requests are drawn once: what is simulated, sent and written for a benchmark is the same."""

from __future__ import annotations

import numpy as np
import pytest

from executor.protocols import OpenLoop
from planner.measuring.cases import traffic_of
from planner.plans.artifacts import SAMPLED_REQUESTS, sampled_load
from planner.workloads.demand import workload_demand
from planner.workloads.workload import list_workloads, load_workload


@pytest.mark.parametrize("name", list_workloads())
@pytest.mark.parametrize("seed", [0, 7])
def test_simulation_load_generator_and_dataset_take_the_same_requests(name: str, seed: int) -> None:
    workload = load_workload(name)
    demand = workload_demand(workload, seed=seed, num_requests=SAMPLED_REQUESTS)
    sent = traffic_of(workload, seed=seed, num_requests=SAMPLED_REQUESTS)
    written = sampled_load(workload, seed=seed)
    assert list(sent.isl) == list(written.isl) == demand.requests.isl.tolist()
    # A client asks for no more than it allows.
    asked = np.minimum(demand.requests.osl, workload.max_output_tokens).tolist()
    assert list(sent.osl) == list(written.osl) == asked
    if isinstance(sent.protocol, OpenLoop):
        np.testing.assert_allclose(sent.protocol.arrival_s, demand.arrival_s)
