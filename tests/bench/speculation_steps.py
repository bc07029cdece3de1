"""Steps of runs that draft: `python -m tests.bench.speculation_steps RUNS.jsonl [HOST] [--fit]`.

A step is quiet where the same sequences were in the batch before: no prompt came, none had ended.
What a step behind an ended request takes longer is what renewing the batch costs; a request that
restricts its tokens makes that dear (flag `token_mask`). `--fit` fits what drafting costs the host
on the quiet steps of the runs without that flag, and leaves the others to test it. HOST is a
calibration of the runs' own host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import click
import numpy as np
from scipy.optimize import least_squares

from cost_models.speculation import SpeculativeStep, speculative_step
from cost_models.step import StepBatch
from planner.calibration.constants import CONSTANTS, with_constants
from planner.validation.validate import run_calibration, run_evaluator
from planner.workloads.measured import MeasuredRun, flat_metrics, read_runs, read_streams
from tests.bench import run_bench

FITTED = (
    "synchronous_host_s",
    "synchronous_host_per_sequence_s",
    "piecewise_decode_layer_s",
    "draft_pass_s",
    "draft_layer_s",
    "drafting_layer_pass_s",
)

YOUNG_STEPS = 8
"""Steps in which a sequence has no quiet ones yet: its n-grams do not match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of one request that came together."""

    at_s: float
    request: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """A run's quiet steps, and what predicts them."""

    run: MeasuredRun
    step_s: float
    renewal_s: float
    """What a step behind an ended request takes longer."""
    model: SpeculativeStep
    batch: StepBatch

    def predicted_s(self, values: Mapping[str, float]) -> float:
        """Return the time of such a step under some constants."""
        verify = self.model.verify
        model = speculative_step(
            self.model.speculation,
            model=verify.model,
            config=verify.config,
            gpu=verify.gpu,
            calibration=with_constants(verify.calibration, values),
        )
        return float(model.iteration(self.batch).seconds)


def main() -> None:
    """Print each run's quiet steps, measured and predicted; with --fit the constants of it too."""
    path, *host = (argument for argument in sys.argv[1:] if argument != "--fit")
    runs = [run for run, _, _ in read_runs(path) if run is not None]
    found = [quiet for run in runs if (quiet := quiet_steps(run, "".join(host))) is not None]
    values: Mapping[str, float] = {}
    if "--fit" in sys.argv:
        values, relative_errors = fit([quiet for quiet in found if not is_masked(quiet.run)])
        for name, value in values.items():
            click.echo(f"{name} {value:.4g}, off by {100 * relative_errors[name]:.0f} %")
    for quiet in found:
        predicted_s, config = quiet.predicted_s(values), quiet.run.engine_config()
        end = "" if np.isnan(quiet.renewal_s) else f", a request's end {1e3 * quiet.renewal_s:+.1f}"
        click.echo(
            f"{short_name(quiet.run.model):22} {int(quiet.run.workload['concurrency']):3} "
            f"{config.decoding_type:12}quiet step {1e3 * quiet.step_s:6.2f} ms, predicted "
            f"{1e3 * predicted_s:6.2f} ({100 * (predicted_s / quiet.step_s - 1):+.0f} %)"
            f"{end}{'  token_mask' if is_masked(quiet.run) else ''}"
        )


def short_name(model: str) -> str:
    """Return a model's name without where it lies."""
    return model.removesuffix("/config.json").rpartition("/")[2]


def is_masked(run: MeasuredRun) -> bool:
    """Whether the run's requests restricted their tokens."""
    return "token_mask" in run.flags


def fit(found: Sequence[Quiet]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the constants of drafting nearest to quiet steps, and the standard error of each.

    Priors hold what the steps do not tell; errors are shares.
    """
    table = [CONSTANTS[name] for name in FITTED]
    prior, log_sd = np.array([[np.log(c.prior), c.log_sd] for c in table]).T

    def residuals(z: Any) -> Any:
        values = dict(zip(FITTED, np.exp(prior + log_sd * z).tolist(), strict=True))
        misses = [np.log(quiet.predicted_s(values) / quiet.step_s) / 0.05 for quiet in found]
        return np.array([*misses, *z])

    best = least_squares(residuals, np.zeros(len(FITTED)), loss="soft_l1")
    errors = log_sd * np.sqrt(np.diag(np.linalg.inv(best.jac.T @ best.jac)))
    values = np.exp(prior + log_sd * best.x)
    return (
        dict(zip(FITTED, values.tolist(), strict=True)),
        dict(zip(FITTED, errors.tolist(), strict=True)),
    )


def quiet_steps(run: MeasuredRun, calibration: str = "") -> Quiet | None:
    """Return the quiet steps of a run that drafts; None of another."""
    if not run.engine_config().speculates:
        return None
    clients = int(run.workload["concurrency"])
    steps = list(steps_of(chunks_of(read_streams(run))))
    took_s: dict[str, list[float]] = {"quiet": [], "renewed": []}
    ages: dict[int, int] = {}
    kinds = [kind_of(step, before, ages, clients) for before, step in pairwise([[], *steps])]
    ends_s = [float(np.mean([chunk.at_s for chunk in step])) for step in steps]
    for row in range(1, len(steps)):
        if kinds[row] in took_s:
            took_s[kinds[row]].append(ends_s[row] - ends_s[row - 1])
    evaluator, deployment = run_evaluator(run, run_calibration(run, calibration))
    model = evaluator.step_model(deployment.config)
    if not isinstance(model, SpeculativeStep):
        raise TypeError(f"{run.run_id} is not predicted as a run that drafts")
    quiet_s = float(np.mean(took_s["quiet"]))
    renewed_s = float(np.mean(took_s["renewed"])) if took_s["renewed"] else np.nan
    context = float(run.workload["isl"]) + float(run.workload["osl"]) / 2
    return Quiet(
        run=run,
        step_s=quiet_s,
        renewal_s=renewed_s - quiet_s if clients > 1 else np.nan,
        model=model,
        batch=StepBatch(decode_sequences=np.float64(clients), decode_kv_len=np.float64(context)),
    )


def tpot_without_renewals_s(run: MeasuredRun) -> float:
    """Return the mean time per output token had no request joined or left at a cost.

    What a step behind an ended request took longer is taken from each such step, and from each
    that brought a prompt.
    """
    quiet = quiet_steps(run)
    if quiet is None or np.isnan(quiet.renewal_s):
        return float(flat_metrics(run.measured)["tpot_ms.mean"]) * 1e-3
    requests = read_streams(run)
    saved_s, first_s, last_s = 0.0, dict[int, float](), dict[int, float]()
    for before, step in pairwise([[], *steps_of(chunks_of(requests))]):
        if any(chunk.is_last for chunk in before) or any(chunk.is_first for chunk in step):
            saved_s += quiet.renewal_s
        for chunk in step:
            first_s.setdefault(chunk.request, chunk.at_s - saved_s)
            last_s[chunk.request] = chunk.at_s - saved_s
    spans_s = [
        (last_s[number] - first_s[number]) / (int(row["osl"]) - 1)
        for number, row in enumerate(requests)
    ]
    return float(np.mean(spans_s))


def kind_of(
    step: Sequence[Chunk], before: Sequence[Chunk], ages: dict[int, int], clients: int
) -> str:
    """Return `quiet`, `renewed` behind an ended request, or nothing; count the requests' steps."""
    for chunk in step:
        ages[chunk.request] = ages.get(chunk.request, 0) + 1
    if any(chunk.is_first for chunk in step):
        return ""
    if any(chunk.is_last for chunk in before):
        return "renewed"
    young = any(ages[chunk.request] <= YOUNG_STEPS for chunk in step)
    return "quiet" if len(step) == clients and not young else ""


def chunks_of(requests: Iterable[Mapping[str, Any]]) -> list[Chunk]:
    """Return all chunks of a run in order of time."""
    found = []
    for number, row in enumerate(requests):
        first_s = float(row["arrival_s"]) + 1e-3 * float(row["ttft_ms"])
        times_s = first_s + np.concatenate([[0.0], 1e-3 * np.cumsum(row["itl_ms"])])
        last = len(times_s) - 1
        found += [
            Chunk(at_s=float(at_s), request=number, is_first=not place, is_last=place == last)
            for place, at_s in enumerate(times_s)
        ]
    return sorted(found, key=lambda chunk: chunk.at_s)


def steps_of(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Yield the chunks of each step: no request has two, and silences lie between steps."""
    step: list[Chunk] = []
    for chunk in chunks:
        places = [place for place, other in enumerate(step) if other.request == chunk.request]
        if places:
            times_s = [other.at_s for other in [*step, chunk]][places[-1] :]
            cut = places[-1] + 1 + int(np.argmax(np.diff(times_s)))
            yield step[:cut]
            step = step[cut:]
        step.append(chunk)
    yield step


if __name__ == "__main__":
    run_bench(main)
