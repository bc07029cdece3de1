"""Optuna's part of a tuning: what a study knows, and which candidate it suggests next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from executor.backend import Failure
from planner.tuning.belief import Belief
from planner.tuning.pool import Pool

CANDIDATE = "candidate"
FAILURE = "failure"

MOST_ATTEMPTS = 2
"""Times that a candidate is tried which fails by chance, as it may seem."""

FOR_GOOD = frozenset({Failure.NOT_AVAILABLE, Failure.PREPARE_FAILED, Failure.CRASHED_AT_START})
"""Failures that a second attempt does not mend."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudyState:
    """What a study knows now."""

    belief: Belief
    choosable: NDArray[np.bool_]
    measured: Mapping[int, list[float]]
    pending: tuple[int, ...]

    @classmethod
    def of(cls, study: optuna.Study, pool: Pool) -> StudyState:
        """Read a study."""
        measured: dict[int, list[float]] = {}
        failures: Counter[int] = Counter()
        choosable = np.ones(len(pool.configs), dtype=bool)
        pending = []
        free_bytes = pool.free_bytes()
        for trial in study.get_trials(deepcopy=False):
            # A pruned one left its candidate to another host.
            if CANDIDATE not in trial.params or trial.state is TrialState.PRUNED:
                continue
            index = int(trial.params[CANDIDATE])
            if trial.value is not None:
                measured.setdefault(index, []).append(trial.value)
            elif trial.state is TrialState.RUNNING:
                pending.append(index)
            elif trial.user_attrs.get(FAILURE) == Failure.OUT_OF_MEMORY:
                # What leaves less free than one that did not fit does not fit either.
                choosable &= free_bytes > free_bytes[index]
            elif FAILURE in trial.user_attrs:
                is_final = trial.user_attrs[FAILURE] in FOR_GOOD
                failures[index] += MOST_ATTEMPTS if is_final else 1
        for index, count in failures.items():
            choosable[index] &= count < MOST_ATTEMPTS
        choosable[list(measured)] = True
        return cls(
            belief=pool.belief().after(measured).without_news(pending),
            choosable=choosable,
            measured=measured,
            pending=tuple(pending),
        )

    @property
    def gains(self) -> NDArray[np.float64]:
        """What measuring each candidate is worth; nothing where it is being measured, or was."""
        gains = self.belief.gains(self.choosable)
        gains[[*self.measured, *self.pending]] = 0.0
        return gains

    @property
    def expected_gain(self) -> float:
        """The largest of them."""
        return float(self.gains.max())


class ModelSampler(optuna.samplers.BaseSampler):
    """Suggests the candidate whose measurement is worth most; at first the plan's own choice."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002  Optuna's form
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """Return the one parameter there is."""
        return {CANDIDATE: CategoricalDistribution(range(len(self.pool.configs)))}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,  # noqa: ARG002  Optuna's form
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return the next candidate."""
        state = StudyState.of(study, self.pool)
        if not state.measured and 0 not in state.pending and state.choosable[0]:
            return {CANDIDATE: 0}
        return {CANDIDATE: int(state.gains.argmax())}

    def sample_independent(self, study: Any, trial: Any, param_name: str, _: Any) -> Any:  # noqa: ARG002
        """Refuse: there is no other parameter."""
        raise AssertionError(param_name)
