"""Serving metrics in closed form, for thousands of configurations at once."""

from planner.estimator.curve import ServingCurve, serving_curve
from planner.estimator.estimate import Estimate, Limits, estimate
from planner.estimator.load import Lengths, Load

__all__ = ["Estimate", "Lengths", "Limits", "Load", "ServingCurve", "estimate", "serving_curve"]
