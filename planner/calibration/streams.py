"""When an engine's steps ended, read from the times at which clients got their tokens.

A decoding sequence gets one token a step, so a step is over when somebody gets a second token.
What a step prefilled follows from the prompts whose first token came with it: the scheduler
fills each step's budget, so a prompt that did not fit began in the steps before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]

SILENCE_S = 0.0035
"""Silence that ends a step whose tokens all came, though nobody has got a second one yet."""

SPREAD_SILENCE_S = 0.013
"""The same where so many are served that the front end pauses while it streams a step."""

MANY_STREAMS = 100
"""Tokens of a step from which it does: vLLM's front end takes 128 outputs at a time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ObservedSteps:
    """Steps in order, one row each; those before the first token are not seen."""

    output_s: FloatArray
    """When its tokens came, on average."""
    spread_s: FloatArray
    """Between the first and the last of them."""
    decoding: FloatArray
    kv_len: FloatArray
    """Mean cached tokens of the decoding sequences."""
    prompts: FloatArray
    prompt_tokens: FloatArray
    past: FloatArray
    """Mean past of equal chunks that attend to as many pairs as the step's."""
    held_back: FloatArray
    """Share of the decoding sequences that got no token: it came with their next one."""
    merged: FloatArray
    """Mean share of their tokens that came in one chunk with another.

    Steps whose tokens all come together look like one step: of such a run they cannot be counted.
    """
    overfull: NDArray[np.bool_]
    """Prompts ended in it that began in steps which nobody saw."""

    @property
    def step_s(self) -> FloatArray:
        """Time since the step before; NaN for the first."""
        return np.diff(self.output_s, prepend=np.nan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stream:
    """One request, and when each of its chunks came."""

    arrival_s: float
    isl: int
    osl: int
    token_s: FloatArray


def observed_steps(requests: Sequence[Mapping[str, Any]], max_num_tokens: int) -> ObservedSteps:
    """Return the steps behind the requests of a run, given the engine's token budget.

    Args:
        requests: Lines of a requests file; those without a first token are left out.
        max_num_tokens: Tokens that the engine works on in one step.
    """
    streams = [_stream(row) for row in requests if row.get("ttft_ms") is not None]
    times = np.concatenate([stream.token_s for stream in streams])
    owners = np.repeat(np.arange(len(streams)), [len(s.token_s) for s in streams])
    order = np.argsort(times, kind="stable")
    steps = _numbered(times[order], owners[order])
    count = int(steps[-1]) + 1
    first, last = np.full(len(streams), count), np.zeros(len(streams), np.intp)
    np.minimum.at(first, owners[order], steps)
    np.maximum.at(last, owners[order], steps)
    output_s = np.bincount(steps, times[order]) / np.bincount(steps)
    begin_s, end_s = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(begin_s, steps, times[order])
    np.maximum.at(end_s, steps, times[order])
    decoding, cached = _decoding(streams, first, last, count)
    prompts, tokens, attended = _prefilled(streams, first, output_s, max_num_tokens - decoding)
    served = np.bincount(steps) - np.bincount(first, minlength=count)
    merged = np.array([1.0 - len(stream.token_s) / stream.osl for stream in streams])
    return ObservedSteps(
        output_s=output_s,
        spread_s=end_s - begin_s,
        decoding=decoding,
        kv_len=cached / np.maximum(decoding, 1.0),
        prompts=prompts,
        prompt_tokens=tokens,
        past=np.maximum(
            attended / np.maximum(tokens, 1.0) - tokens / (2 * np.maximum(prompts, 1.0)), 0.0
        ),
        held_back=1.0 - served / np.maximum(decoding, 1.0),
        merged=np.bincount(steps, merged[owners[order]]) / np.bincount(steps),
        overfull=tokens > max_num_tokens - decoding + 0.5,
    )


def _stream(row: Mapping[str, Any]) -> _Stream:
    first_s = float(row["arrival_s"]) + 1e-3 * float(row["ttft_ms"])
    gaps_s = 1e-3 * np.asarray(row.get("itl_ms") or [], np.float64)
    return _Stream(
        arrival_s=float(row["arrival_s"]),
        isl=int(row["isl"]),
        osl=int(row["osl"]),
        token_s=first_s + np.concatenate([[0.0], np.cumsum(gaps_s)]),
    )


def _numbered(times: FloatArray, owners: IntArray) -> IntArray:
    """Return the step of each token, in order of time."""
    steps = np.zeros(len(times), np.intp)
    step, served = 0, set[int]()
    silences = np.diff(times, prepend=times[0]).tolist()
    for row, (owner, silence_s) in enumerate(zip(owners.tolist(), silences, strict=True)):
        longest_s = SILENCE_S if len(served) < MANY_STREAMS else SPREAD_SILENCE_S
        if owner in served or silence_s > longest_s:
            step, served = step + 1, set()
        served.add(owner)
        steps[row] = step
    return steps


def _decoding(
    streams: Sequence[_Stream], first: IntArray, last: IntArray, count: int
) -> tuple[FloatArray, FloatArray]:
    """Return how many sequences decode in each step, and their cached tokens in all."""
    decoding, cached = np.zeros(count), np.zeros(count)
    for stream, begin, end in zip(streams, first.tolist(), last.tolist(), strict=True):
        if end > begin:
            decoding[begin + 1 : end + 1] += 1
            grown = np.linspace(1, max(stream.osl - 1, 1), end - begin)
            cached[begin + 1 : end + 1] += stream.isl + grown
    return decoding, cached


def _prefilled(
    streams: Sequence[_Stream], first: IntArray, output_s: FloatArray, room: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return prompts, prompt tokens and query-key pairs of each step.

    Each prompt takes what room is left, from the step of its first token backwards to its arrival.
    """
    prompts, tokens, attended = (np.zeros(len(output_s)) for _ in range(3))
    order = sorted(range(len(streams)), key=lambda row: (first[row], streams[row].arrival_s))
    for row in order:
        stream, step = streams[row], int(first[row])
        left = float(stream.isl)
        while left > 0 and step >= 0 and (step == first[row] or output_s[step] > stream.arrival_s):
            chunk = min(left, max(room[step] - tokens[step], 0.0))
            if chunk > 0:
                tokens[step] += chunk
                attended[step] += chunk * (left - chunk / 2)
                prompts[step] += 1
                left -= chunk
            step -= 1
        if left > 0:
            tokens[first[row]] += left
            attended[first[row]] += left * left / 2
            prompts[first[row]] += 1
    return prompts, tokens, attended
