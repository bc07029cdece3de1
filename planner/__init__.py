"""Plans how to run a large language model on TensorRT-LLM.

`plan`, `predict` and `validate` are the use cases; they load on first use, so that
importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.plans.make import plan
    from planner.question import PlanRequest, predict
    from planner.validation.validate import validate

__all__ = ["PlanRequest", "plan", "predict", "validate"]

_HOMES = {
    "PlanRequest": "planner.question",
    "plan": "planner.plans.make",
    "predict": "planner.question",
    "validate": "planner.validation.validate",
}


def __getattr__(name: str) -> Any:
    """Load a use case when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(_HOMES[name]), name)
