"""Runs a step on its engine, where both the engine and the GPU that was asked for are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cost_models.engine import EngineConfig
from cost_models.errors import PlannerError
from cost_models.profile_io import load_gpu
from engines.registry import as_run
from executor.backend import load_backend
from planner.ladder.rungs import Rung
from planner.local_gpu import local_gpu
from planner.measuring.cases import backend_defaults
from planner.measuring.measure import measure_request
from planner.measuring.request import MeasureRequest
from planner.workloads.measured import flat_metrics

if TYPE_CHECKING:
    from planner.ladder.request import LadderRequest

BASELINE = "transformers"


class Bench:
    """Measures steps through `planner measure`, and keeps their runs in the store.

    Args:
        request: What the ladder was asked.
    """

    def __init__(self, request: LadderRequest) -> None:
        self.request = request
        self.is_this_gpu = _is_this_gpu(request.gpu)

    def can_run(self, rung: Rung) -> bool:
        """Return whether the step's engine runs on the GPU that was asked for."""
        if not self.is_this_gpu:
            return False
        return load_backend(self._backend(rung)).availability().can_run

    def measured(
        self, rung: Rung, config: EngineConfig, checkpoint: str
    ) -> tuple[Mapping[str, float], str]:
        """Return the medians of what was measured, and why nothing was where that is empty."""
        backend = self._backend(rung)
        wanted = self._config(rung, config, checkpoint)
        try:
            (found,) = measure_request(
                MeasureRequest(
                    backend=backend,
                    workload=self.request.workload,
                    model=checkpoint or self.request.model,
                    gpu=load_gpu(self.request.gpu).name,
                    configs=(wanted,),
                    store=self.request.store,
                    time_budget_s=self.request.time_budget_s,
                    seed=self.request.seed,
                )
            )
        except PlannerError as error:
            return {}, f"not measured: {error}"
        if not found.measured:
            last = found.records[-1]
            said = str(last.get("error") or "no run was stored").splitlines()[0]
            return {}, f"not measured ({last['status']}): {said}; planner diagnose {last['run_id']}"
        return _medians([flat_metrics(one) for one in found.measured]), ""

    def _backend(self, rung: Rung) -> str:
        return BASELINE if rung.is_baseline else self.request.backend

    def _config(self, rung: Rung, config: EngineConfig, checkpoint: str) -> EngineConfig:
        """Return the configuration as its backend takes it."""
        if rung.is_baseline:
            defaults = backend_defaults(BASELINE)
            limits = {"max_batch_size": config.max_batch_size, "max_seq_len": config.max_seq_len}
            return EngineConfig(**{**defaults, **limits})
        if _is_built(checkpoint, self.request.model):
            return config
        return as_run(config, self.request.backend)


def _is_built(checkpoint: str, model: str) -> bool:
    return bool(checkpoint) and checkpoint != model


def _is_this_gpu(gpu: str) -> bool:
    try:
        return local_gpu() == load_gpu(gpu).name
    except PlannerError:
        return False


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    names = set.intersection(*(set(run) for run in runs))
    return {name: float(np.median([run[name] for run in runs])) for name in names}
