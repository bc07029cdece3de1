"""The use cases as functions, for programs: each is at home in a package of its own.

Loading this module loads all of them; commands and screens take what they need from its home.
"""

from __future__ import annotations

from planner.diagnosis.diagnose import diagnose
from planner.plans.make import plan, plan_problem
from planner.question import (
    PlanRequest,
    Problem,
    load_problem,
    predict,
    predict_problem,
    requested_problem,
    search_space,
)
from planner.validation.validate import validate

__all__ = [
    "PlanRequest",
    "Problem",
    "diagnose",
    "load_problem",
    "plan",
    "plan_problem",
    "predict",
    "predict_problem",
    "requested_problem",
    "search_space",
    "validate",
]
