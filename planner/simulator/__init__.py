"""Continuous-batching simulator: real arrivals, KV blocks, scheduler policies, percentiles."""

from planner.simulator.arrivals import gamma_arrivals, offline_arrivals, poisson_arrivals
from planner.simulator.clock import StepClock, StepCostModel
from planner.simulator.limits import EngineLimits, Refusal
from planner.simulator.requests import Requests
from planner.simulator.results import SimulationResult
from planner.simulator.simulate import Arrivals, ServerModel, simulate

__all__ = [
    "Arrivals",
    "EngineLimits",
    "Refusal",
    "Requests",
    "ServerModel",
    "SimulationResult",
    "StepClock",
    "StepCostModel",
    "gamma_arrivals",
    "offline_arrivals",
    "poisson_arrivals",
    "simulate",
]
