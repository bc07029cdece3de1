"""Continuous-batching simulator: real arrivals, KV blocks, scheduler policies, percentiles."""

from planner.simulator.arrivals import gamma_arrivals, offline_arrivals, poisson_arrivals
from planner.simulator.clock import StepClock, StepCostModel
from planner.simulator.limits import EngineLimits
from planner.simulator.requests import Requests
from planner.simulator.results import SimulationResult
from planner.simulator.simulate import Arrivals, Share, simulate, simulate_in_step

__all__ = [
    "Arrivals",
    "EngineLimits",
    "Requests",
    "Share",
    "SimulationResult",
    "StepClock",
    "StepCostModel",
    "gamma_arrivals",
    "offline_arrivals",
    "poisson_arrivals",
    "simulate",
    "simulate_in_step",
]
