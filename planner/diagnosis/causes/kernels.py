"""Kernels: decode steps outside CUDA graphs, a precision that runs slower than it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from cost_models.errors import PlannerError
from cost_models.precision import quantization
from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import Finding
from planner.diagnosis.prospect import Prospect, SimulatedProspect, prospect_of, ratios
from planner.diagnosis.remedies import gain, remedies_of, tried
from planner.workloads.measured import MeasuredRun

MUCH_SLOWER = 1.25
"""Measured over predicted times from which a precision is much slower than it should be."""

AS_PREDICTED = 1.1
"""The same up to which the other precisions count as well predicted."""

MOST_BESIDE = 3
"""Runs of each other precision that are predicted for comparison."""

WORTH_ANOTHER = 0.05
"""Gain of another quantization from which the present one is the wrong one for a batch."""


def cuda_graphs(case: RunCase) -> Finding | None:
    """Decode batches larger than any that was captured are launched kernel by kernel."""
    prospect = case.simulated
    if prospect is None:
        return None
    config = prospect.config
    sizes = prospect.evaluator.calibration.traits.captured_batch_sizes(config)
    uncovered = _uncovered(prospect, sizes)
    whole = {"cuda_graph_max_batch_size": config.max_batch_size, "cuda_graph_padding": True}
    found = tried(case, prospect, [whole], metric="tpot_ms.mean") if uncovered else []
    if not found:
        return None
    eager = " (none: the engine runs eagerly)" if not sizes else ""
    return Finding(
        cause="cuda_graphs",
        words="CUDA graphs do not cover the batch: the host launches each kernel of a step",
        evidence=(
            f"{100 * uncovered:.0f} % of the decode steps run a batch for which "
            "no graph was captured (predicted)",
            f"largest captured batch {max(sizes, default=0)}{eager}, padding "
            f"{'on' if config.cuda_graph_padding else 'off'}, max_batch_size "
            f"{config.max_batch_size}",
        ),
        remedies=remedies_of(found),
        ratios=ratios(prospect.base, found[0].prediction),
    )


def wrong_kernel(case: RunCase) -> Finding | None:
    """This precision alone is much slower than predicted: the engine chose another kernel."""
    prospect = case.simulated
    # What the GPU idled through is no kernel's time.
    own = _slowness(case.run, prospect) * (case.reading("busy_fraction") or 1.0)
    if prospect is None or own < MUCH_SLOWER:
        return None
    precision = str(case.run.config.get("quantization"))
    beside = _other_precisions(case, precision)
    if not beside or max(beside.values()) > AS_PREDICTED:
        return None
    listed = ", ".join(f"{name} {ratio:.2f}" for name, ratio in beside.items())
    left = 1 / own
    found = tried(
        case, prospect, [{"quantization": name} for name in beside], metric="tpot_ms.mean"
    )
    return Finding(
        cause="wrong_kernel",
        words=f"wrong kernel for {precision}: this precision alone is slower than predicted",
        evidence=(
            f"tokens and requests take at least {own:.2f} times the prediction in {precision}",
            f"the same for other precisions of this model, GPU and engine: {listed}",
        ),
        remedies=remedies_of(found),
        ratios={"tpot_ms.mean": left, "e2el_ms.mean": left, "output_tok_per_s": own},
        is_foreseen=False,
    )


def emulated_precision(case: RunCase) -> Finding | None:
    """The GPU has no arithmetic for the checkpoint's precision, so the engine emulates it."""
    prospect = case.prospect
    if prospect is None:
        return None
    gpu, row = prospect.evaluator.gpu, quantization(prospect.config.quantization)
    if row.compute in gpu.flop_per_s:
        return None
    simulated = case.simulated
    others = _quantizations(prospect)
    found = tried(case, simulated, others, metric="tpot_ms.mean") if simulated else []
    return Finding(
        cause="emulated_precision",
        words=f"{gpu.title} has no {row.compute.upper()} arithmetic: {row.title} is emulated",
        evidence=(
            f"tensor cores of sm{gpu.sm} compute {', '.join(sorted(gpu.flop_per_s))}",
            f"{case.knob('quantization')} {prospect.config.quantization} needs {row.compute}",
        ),
        remedies=remedies_of(found),
        ratios=ratios(prospect.base, found[0].prediction) if found else {},
        explains_failure=case.failed,
    )


def weight_only_at_large_batch(case: RunCase) -> Finding | None:
    """Weights are unpacked to 16 bits for each step, which costs more than it saves here."""
    prospect = case.simulated
    if prospect is None:
        return None
    row = quantization(prospect.config.quantization)
    if not (row.weight_bits < 16 and row.compute == "bf16"):
        return None
    found = tried(case, prospect, _quantizations(prospect), metric="tpot_ms.mean")
    if not found or gain(prospect.base, found[0].prediction, "tpot_ms.mean") < WORTH_ANOTHER:
        return None
    return Finding(
        cause="weight_only_at_large_batch",
        words=f"{row.title} computes in BF16 and unpacks weights each step: at this batch it loses",
        evidence=(
            f"{_mean_batch(case, prospect):.0f} requests decode at once on average",
            f"GEMMs take {100 * _gemm_share(prospect):.0f} % of the time (predicted)",
        ),
        remedies=remedies_of(found),
        ratios=ratios(prospect.base, found[0].prediction),
    )


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "cuda_graphs": cuda_graphs,
    "wrong_kernel": wrong_kernel,
    "emulated_precision": emulated_precision,
    "weight_only_at_large_batch": weight_only_at_large_batch,
}


def _uncovered(prospect: SimulatedProspect, sizes: tuple[int, ...]) -> float:
    """Return the share of the decode steps whose batch has no graph."""
    batches = np.concatenate([log.decoding for log in prospect.logs])
    steps = np.concatenate([np.where(log.prompts == 0, log.steps, 0) for log in prospect.logs])
    if not steps.sum():
        return 0.0
    outside = batches > max(sizes, default=0)
    if not prospect.config.cuda_graph_padding:
        outside |= ~np.isin(batches, sizes)
    return float(steps[outside].sum() / steps.sum())


def _slowness(run: MeasuredRun, prospect: Prospect | None) -> float:
    """Return by what factor both tokens and whole requests are slower; 0 where it is unknown."""
    if not isinstance(prospect, SimulatedProspect):
        return 0.0
    names = ("tpot_ms.mean", "e2el_ms.mean")
    return min(run.measured.get(name, 0.0) / prospect.base.value(name) for name in names)


def _other_precisions(case: RunCase, own: str) -> dict[str, float]:
    """Return the median slowness of the runs beside it, by precision."""
    runs: dict[str, list[MeasuredRun]] = {}
    for run in case.siblings:
        name = str(run.config.get("quantization"))
        if name != own and len(runs.setdefault(name, [])) < MOST_BESIDE:
            runs[name].append(run)
    found = {name: [_slowness(run, _prospect(run)) for run in some] for name, some in runs.items()}
    return {name: float(np.median(factors)) for name, factors in found.items() if all(factors)}


def _prospect(run: MeasuredRun) -> Prospect | None:
    try:
        return prospect_of(run)
    except PlannerError:
        return None


def _quantizations(prospect: Prospect) -> Iterator[dict[str, str]]:
    """Yield the other quantizations that the engine runs natively on this GPU."""
    model, gpu = prospect.evaluator.model, prospect.evaluator.gpu
    for name in prospect.rules.legal_values("quantization", model=model, gpu=gpu):
        if name != prospect.config.quantization and quantization(name).compute in gpu.flop_per_s:
            yield {"quantization": name}


def _mean_batch(case: RunCase, prospect: SimulatedProspect) -> float:
    if case.log is not None:
        return case.log.mean_decoding
    return float(np.mean([np.average(log.decoding, weights=log.steps) for log in prospect.logs]))


def _gemm_share(prospect: Prospect) -> float:
    times = prospect.base.time_by_operator
    return times.get("gemm", 0.0) / sum(times.values())
