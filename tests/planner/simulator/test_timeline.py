"""A simulated run at evenly spaced moments."""

from __future__ import annotations

import numpy as np

from planner.question import load_problem, predict_problem
from planner.simulator.timeline import DECODE, IDLE, timeline
from planner.workloads.demand import workload_demand


def test_blocks_steps_and_queue_agree_with_the_run() -> None:
    problem = load_problem(gpu="h100", workload="chat")
    demand = workload_demand(problem.workload)
    settings = {"enable_block_reuse": "false"}
    deployment = problem.default_deployment
    result = predict_problem(problem, deployment, settings, demand=demand)[0].simulation
    assert result is not None
    seen = timeline(result, moments=2000)
    usage = result.kv_usage()
    assert seen.used_blocks.max() <= usage.max_fraction * seen.capacity_blocks * (1 + 1e-6)
    busy = seen.kind != IDLE
    mean = seen.used_blocks[busy].mean() / seen.capacity_blocks
    assert np.isclose(mean, usage.mean_fraction, rtol=0.1)
    assert (seen.wasted_blocks <= seen.used_blocks).all()
    decoding = seen.kind == DECODE
    waste = seen.wasted_blocks[decoding].sum() / seen.used_blocks[decoding].sum()
    assert np.isclose(waste, usage.waste_fraction, rtol=0.2)
    assert not seen.shared_blocks.any()
    assert np.isnan(seen.step_s[~busy]).all()
    assert (seen.step_s[busy] > 0).all()
