"""Fits the constants of a step on the steps that clients saw: no simulation, so seconds suffice.

Single steps are not compared: a launch that takes long delays the output of the step before.
Windows of some steps are, timed as the step loop of an engine that runs ahead would time them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cost_models.calibration import HOST_STEP_CONSTANTS, Calibration
from cost_models.step import StepBatch, StepModel
from planner.calibration.constants import Constant, Part, with_constants
from planner.calibration.solver import Solution, shared_apart, solve_costly, told
from planner.calibration.streams import ObservedSteps, observed_steps
from planner.calibration.unknowns import Slopes, Unknowns
from planner.validation.validate import run_evaluator
from planner.workloads.measured import MeasuredRun, read_streams

FloatArray = NDArray[np.float64]

WINDOW_STEPS = 8
"""Fewest steps of a window; it goes on until steps that only decode, where nothing is delayed."""

LONGEST_WINDOW = 3 * WINDOW_STEPS

LEAD_STEPS = 2
"""Steps before a window, from which the loop's lead over the GPU follows."""

EVALUATIONS = 6
"""Most steps of a solution."""

SETTLED = 5e-4
"""Share of the loss that a step must gain for another one to follow."""

HOST_STARTS = (0.0, 1.0)
"""Where solutions start: all constants of the host so many deviations above their priors."""

ROUNDS = 5
"""Most solutions, each with slopes of its own."""

ROUND_GAIN = 0.01
"""Share of the loss that a round must gain for another one to follow."""

WINDOWS_OF_A_RUN = 24
"""Most of them; more say little new."""

WINDOW_LOG_SD = 0.05
"""Error that is expected of a window even under the right constants."""

TOGETHER = 8
"""Windows of a run count as so many: they share what is peculiar to it."""

RUN_LOG_SD = 0.035
"""Error that windows of one kind have in common within a run: one observation, not many.

What is left between the H200's 70 runs under the shipped constants (0.034, by maximum likelihood;
by median absolute deviation 0.027 in steps that only decode, 0.045 in those with prompts).
"""

BUSY_SPREAD = 0.55
"""Share of a step over which its tokens come from which the front end, not the engine, set it."""

HELD_BACK = 0.02
"""Share of the sequences whose token comes with the next one from which the same holds."""

MERGED = 0.05
"""Share of the tokens that come with another from which steps are not counted right."""

MOST_BUSY = 0.3
"""Share of such steps from which a window says nothing of the engine."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Spans of a run's steps, beside what each took."""

    batch: StepBatch
    """The steps of all windows, each once."""
    rows: NDArray[np.intp]
    """Rows of `batch`: one line a window, from its lead to the step behind it, then that again."""
    steps: NDArray[np.intp]
    """Length of each."""
    took_s: FloatArray

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.steps)

    @cached_property
    def quiet(self) -> NDArray[np.bool_]:
        """Whether none of a window's steps has a prompt."""
        mixed = (np.asarray(self.batch.prefill_tokens) > 0)[self.rows]
        column = np.arange(self.rows.shape[1])
        inside = (column >= LEAD_STEPS) & (column < LEAD_STEPS + self.steps[:, None])
        return np.asarray(~(mixed & inside).any(axis=1))

    def predicted_s(self, model: StepModel) -> FloatArray:
        """Return how long an engine that plans a step ahead takes for each window."""
        cost = model.cost(self.batch)
        mixed = np.asarray(self.batch.prefill_tokens) > 0
        floor_s = model.launch_floor_s(self.batch.decode_sequences, self.batch.prefill_tokens)
        output_s = _loop(
            cost.seconds[self.rows],
            np.where(mixed, floor_s, 0.0)[self.rows],
            np.where(mixed, cost.by_family["launch"], 0.0)[self.rows],
            mixed[self.rows],
        )
        line = np.arange(len(self))
        took_s = output_s[line, LEAD_STEPS + self.steps - 1] - output_s[line, LEAD_STEPS - 1]
        return np.asarray(took_s)


def _loop(
    step_s: FloatArray, floor_s: FloatArray, launch_s: FloatArray, mixed: NDArray[np.bool_]
) -> FloatArray:
    """Return when each step's tokens leave, by the simulator's rules (`Engine.mixed_timing`)."""
    output_s = np.zeros(step_s.shape)
    end_s, scheduled_s = np.zeros(len(step_s)), -step_s[:, 0]
    for column in range(step_s.shape[1]):
        out_s = np.maximum(end_s, scheduled_s + floor_s[:, column])
        if column:
            output_s[:, column - 1] = out_s
        start_s = np.maximum(end_s, scheduled_s)
        hidden_s = np.minimum(launch_s[:, column], start_s - scheduled_s)
        end_s = start_s + step_s[:, column] - hidden_s
        scheduled_s = np.where(mixed[:, column], out_s, start_s)
    output_s[:, -1] = end_s
    return output_s


def windows_of(steps: ObservedSteps) -> Windows | None:
    """Return the windows of a run's steps, evenly chosen; None where there are none."""
    spans = list(_spans(steps))
    if not spans:
        return None
    chosen = np.unique(np.linspace(0, len(spans) - 1, WINDOWS_OF_A_RUN).round().astype(int))
    starts, ends = np.array([spans[row] for row in chosen]).T
    longest = int((ends - starts).max()) + LEAD_STEPS + 1
    rows = starts[:, None] - LEAD_STEPS + np.arange(longest)
    rows, inverse = np.unique(np.minimum(rows, ends[:, None]), return_inverse=True)
    return Windows(
        batch=StepBatch(
            decode_sequences=steps.decoding[rows],
            decode_kv_len=steps.kv_len[rows],
            prefill_sequences=steps.prompts[rows],
            prefill_tokens=steps.prompt_tokens[rows],
            prefill_past=steps.past[rows],
        ),
        rows=inverse.reshape(len(chosen), longest),
        steps=ends - starts,
        took_s=steps.output_s[ends - 1] - steps.output_s[starts - 1],
    )


def _spans(steps: ObservedSteps) -> Iterator[tuple[int, int]]:
    """Yield first step and end of each window."""
    serving = steps.decoding > 0
    plain = serving & (steps.prompt_tokens == 0)
    busy = steps.spread_s > BUSY_SPREAD * np.nan_to_num(steps.step_s)
    held_back = steps.held_back > HELD_BACK
    start, last = LEAD_STEPS + 1, len(serving) - LEAD_STEPS
    while start < last:
        end = (
            _end(serving, plain, start) if serving[start - LEAD_STEPS - 1 : start].all() else start
        )
        whole = slice(start - LEAD_STEPS, end + 1)
        if (
            end - start >= WINDOW_STEPS
            and serving[whole].all()
            and not steps.overfull[whole].any()
            and steps.merged[whole].mean() < MERGED
            and (busy | held_back)[start:end].mean() < MOST_BUSY
        ):
            yield start, end
        start = max(end, start + 1)


def _end(serving: NDArray[np.bool_], plain: NDArray[np.bool_], start: int) -> int:
    """Return where a window ends: before steps that only decode, if they come soon enough."""
    end = start
    while (
        end < len(serving) - LEAD_STEPS
        and serving[end]
        and end - start < LONGEST_WINDOW
        and (end - start < WINDOW_STEPS or not plain[end - 2 : end + 1].all())
    ):
        end += 1
    return end


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepFit:
    """Constants of a step as the windows tell them."""

    values: Mapping[str, float]
    """Those that the windows tell; the others are not named."""
    log_sds: Mapping[str, float]
    """Standard error of each as a share of it."""
    slopes: Slopes
    """Of each run's windows, where the fit ended."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeenRun:
    """A run's windows, and the step model that they are compared with."""

    run_id: str
    windows: Windows
    model: StepModel

    @classmethod
    def of(cls, run: MeasuredRun, calibration: Calibration) -> SeenRun | None:
        """Return the same of a measured run; None where it shows no steps.

        Raises:
            ProfileError: The run's requests file cannot be read.
        """
        requests = read_streams(run)
        if not requests:
            return None
        evaluator, deployment = run_evaluator(run, calibration)
        config = deployment.config
        windows = windows_of(observed_steps(requests, config.max_num_tokens))
        model = evaluator.step_model(config)
        # Drafts give a step more tokens than the windows count.
        if windows is None or not isinstance(model, StepModel):
            return None
        return cls(run_id=run.run_id, windows=windows, model=model)

    def misses(self, values: Mapping[str, float]) -> FloatArray:
        """Return the log error of each window over the expected one."""
        calibration = with_constants(self.model.calibration, values)
        predicted_s = self.windows.predicted_s(replace(self.model, calibration=calibration))
        alike = max(len(self.windows) / TOGETHER, 1.0)
        noise = WINDOW_LOG_SD * np.sqrt(alike)
        error = np.log(predicted_s / self.windows.took_s)
        kinds = np.stack([self.windows.quiet, ~self.windows.quiet], axis=1)
        return shared_apart(error / noise, RUN_LOG_SD / noise * kinds)


def fit_steps(
    seen: Sequence[SeenRun], table: Mapping[str, Constant], *, whole: StepFit | None = None
) -> StepFit:
    """Return the constants of a step nearest to the windows, held by their priors.

    Args:
        seen: Runs that show their steps.
        table: The constants of the engine's form; those of the front end are left alone.
        whole: A fit on these runs and others, whose slopes show the way.
    """
    told_of = _told(seen, table)
    if not told_of:
        return StepFit(values={}, log_sds={}, slopes=Slopes(by_run={}))
    unknowns = Unknowns.of(told_of)
    if whole is None:
        fit, slopes = _solved_from_starts(seen, unknowns)
    else:
        start = unknowns.at({**_priors(table), **whole.values})
        fit, slopes = _solved(seen, unknowns, start, whole.slopes), whole.slopes
    return StepFit(
        values=unknowns.values(fit.x), log_sds=unknowns.relative_errors(fit.jac), slopes=slopes
    )


def _solved_from_starts(seen: Sequence[SeenRun], unknowns: Unknowns) -> tuple[Solution, Slopes]:
    """Start at the priors, and with a slower host; the likelier solution counts.

    A launch that the GPU hides has no slope, so from the priors alone a slow host would be taken
    for slow kernels.
    """
    host = np.array([float(name in HOST_STEP_CONSTANTS) for name in unknowns.names])
    starts = [np.clip(sds * host, *unknowns.bounds) for sds in HOST_STARTS]
    found = [_solved_in_rounds(seen, unknowns, z) for z in starts]
    return min(found, key=lambda solution: solution[0].doubt)


def _solved_in_rounds(
    seen: Sequence[SeenRun], unknowns: Unknowns, z: FloatArray
) -> tuple[Solution, Slopes]:
    """Take slopes anew where each solution ended: what hides a launch is another thing there."""
    loss = math.inf
    for _ in range(ROUNDS):
        slopes = _slopes(seen, unknowns, z)
        fit = _solved(seen, unknowns, z, slopes)
        z, gained = fit.x, loss - fit.loss
        loss = fit.loss
        if gained < ROUND_GAIN * loss:
            break
    return fit, slopes


def _told(seen: Sequence[SeenRun], table: Mapping[str, Constant]) -> dict[str, Constant]:
    """Return the constants of a step that change the time of any window."""
    found = {name: c for name, c in table.items() if c.part is not Part.FRONT_END}
    if not seen:
        return {}
    unknowns = Unknowns.of(found)
    told_of = told(
        lambda z: np.concatenate(_misses(seen, unknowns, z)), np.zeros(len(unknowns.names))
    )
    return {name: found[name] for name, is_told in zip(found, told_of, strict=True) if is_told}


def _priors(table: Mapping[str, Constant]) -> dict[str, float]:
    return {name: constant.prior for name, constant in table.items()}


def _misses(seen: Sequence[SeenRun], unknowns: Unknowns, z: FloatArray) -> list[FloatArray]:
    values = unknowns.values(z)
    return [run.misses(values) for run in seen]


def _slopes(seen: Sequence[SeenRun], unknowns: Unknowns, z: FloatArray) -> Slopes:
    return Slopes.measured(
        lambda moved, _: _misses(seen, unknowns, moved),
        unknowns,
        run_ids=[run.run_id for run in seen],
        start=z,
        base=_misses(seen, unknowns, z),
    )


def _solved(seen: Sequence[SeenRun], unknowns: Unknowns, z: FloatArray, slopes: Slopes) -> Solution:
    run_ids = [run.run_id for run in seen]
    return solve_costly(
        lambda z: np.concatenate([*_misses(seen, unknowns, z), z]),
        z,
        bounds=unknowns.bounds,
        steps=EVALUATIONS,
        jac=slopes.jacobian(unknowns, run_ids, _misses(seen, unknowns, z)),
        settled=SETTLED,
    )
