"""Failed runs: what ended them, what the log says of it, and what to change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from planner.diagnosis.case import RunCase
from planner.diagnosis.finding import Finding, Remedy
from planner.diagnosis.shortage import shortage_in_log

SHOWN_LINES = 3
"""Lines of a log that are shown as evidence."""

ERROR_LINE = re.compile(r"error|exception|fatal|killed|abort", re.IGNORECASE)
"""Lines of an engine's log that say what went wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """What one kind of failure means."""

    words: str
    actions: tuple[str, ...]


BY_STATUS: Mapping[str, Failed] = {
    "not_available": Failed(
        words="the backend cannot run here, or lacks a knob of the configuration",
        actions=("planner doctor: which backends can run, and the line that installs them",),
    ),
    "start_timed_out": Failed(
        words="the engine did not answer within the time for its start",
        actions=(
            "a longer --time-budget: it bounds the start too",
            "fewer CUDA graphs or no compilation, if the log ends there",
        ),
    ),
    "crashed": Failed(
        words="the engine died while requests were in flight",
        actions=("the log's last error says why; the same command in the record starts it again",),
    ),
    "hung": Failed(
        words="the engine lives, but nothing came within the limit",
        actions=(
            "measure again: if it repeats at the same request, the engine's scheduler is stuck",
            "a KV cache that cannot hold the longest request to its end waits for ever",
        ),
    ),
    "lost_connection": Failed(
        words="connections broke while the engine lived",
        actions=("a proxy or a limit on connections between client and engine",),
    ),
    "wrong_length": Failed(
        words="answers had another number of tokens than was asked for",
        actions=(
            "ignore_eos must be honoured; max_seq_len must hold prompt and output",
            "a server that counts text, not tokens, is measured with --backend endpoint",
        ),
    ),
    "not_ended": Failed(
        words="processes or GPU memory of the engine were still there after its end",
        actions=("end them before the next run: what follows shares the GPU with them",),
    ),
    "interrupted": Failed(
        words="the run was interrupted", actions=("the same command goes on where it stopped",)
    ),
    "prepare_failed": Failed(
        words="the checkpoint or the engine could not be built",
        actions=("the log's last error; build_failure names what it points to",),
    ),
}
"""Failures that need no prediction."""

BUILD_PROBLEMS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"architecture.{0,40}not supported|not recogni[sz]e this arch", re.IGNORECASE),
        "the engine does not know the model's architecture",
        "a newer engine version, or the `architectures` of config.json are misspelt",
    ),
    (
        re.compile(r"no kernel image|compute capability|not supported on sm", re.IGNORECASE),
        "the engine has no kernels for this GPU's compute capability",
        "a precision that this GPU runs natively: planner plan searches only those",
    ),
    (
        re.compile(
            r"safetensors|size mismatch|missing key|hf_quant_config|checkpoint", re.IGNORECASE
        ),
        "the checkpoint is not in a form that the engine loads",
        "make it anew with quantize.sh of the plan, and check its files",
    ),
    (
        re.compile(r"ModuleNotFoundError|ImportError|cannot open shared object|undefined symbol"),
        "the engine's installation lacks something",
        "planner doctor, then reinstall the engine in an environment of its own",
    ),
    (
        re.compile(
            r"ValidationError|unrecognized arguments|invalid choice|extra inputs", re.IGNORECASE
        ),
        "the engine does not take one of its options",
        "write the files anew with planner plan --out for this engine version",
    ),
)
"""(pattern of the log, what it means, what to do): a start or a build that failed."""


def ended_badly(case: RunCase) -> Finding | None:
    """The kind of failure, with the lines of the log that belong to it."""
    known = BY_STATUS.get(case.status)
    if known is None or shortage_in_log(case.error):
        return None
    return Finding(
        cause="ended_badly",
        words=known.words,
        evidence=(*_request_words(case), *_said(case)),
        remedies=tuple(Remedy(knob="", action=action) for action in known.actions),
        explains_failure=True,
    )


def build_failure(case: RunCase) -> Finding | None:
    """The engine could not be built or started with this checkpoint, GPU or option."""
    if case.status not in ("crashed_at_start", "prepare_failed"):
        return None
    for pattern, words, action in BUILD_PROBLEMS:
        lines = case.log_lines(pattern)
        if lines:
            return _build_finding(case, words, action, lines)
    return _build_finding(
        case, "the engine ended while it started", "its log says why", list(_said(case))
    )


def refused_requests(case: RunCase) -> Finding | None:
    """The engine answered with an error instead of tokens."""
    if case.status != "refused":
        return None
    longest, limit = _longest(case), int(case.run.config.get("max_seq_len") or 0)
    too_long = 0 < limit < longest
    words = "the engine refused requests"
    return Finding(
        cause="refused_requests",
        words=f"{words}: they are longer than max_seq_len" if too_long else words,
        evidence=(
            *_request_words(case),
            *((f"longest request {longest} tokens, max_seq_len {limit}",) if limit else ()),
            *_said(case),
        ),
        remedies=(
            Remedy(knob=case.knob("max_seq_len"), action=case.turn("max_seq_len", limit, longest)),
        )
        if too_long
        else (Remedy(knob="", action="the server's message names what it does not take"),),
        explains_failure=True,
    )


def out_of_time(case: RunCase) -> Finding | None:
    """The load takes longer than the run was given."""
    if case.status != "out_of_time":
        return None
    prospect = case.simulated
    evidence, action = list(_request_words(case)), "a longer --time-budget, or fewer --requests"
    if prospect is not None:
        rate, asked = prospect.base.value("request_per_s"), len(prospect.demand)
        evidence.append(
            f"{asked} requests at {rate:.3g} requests/s take {asked / rate:.0f} s (predicted)"
        )
        action = (
            f"--time-budget {2 * asked / rate:.0f}s: twice what is predicted, or fewer requests"
        )
    return Finding(
        cause="out_of_time",
        words="the time was over before all requests were answered",
        evidence=tuple(evidence),
        remedies=(Remedy(knob="", action=action),),
        explains_failure=True,
    )


CAUSES: Mapping[str, Callable[[RunCase], Finding | None]] = {
    "build_failure": build_failure,
    "refused_requests": refused_requests,
    "out_of_time": out_of_time,
    "ended_badly": ended_badly,
}


def _build_finding(case: RunCase, words: str, action: str, lines: list[str]) -> Finding:
    return Finding(
        cause="build_failure",
        words=words,
        evidence=tuple(line[:200] for line in lines[:SHOWN_LINES]),
        remedies=(Remedy(knob="", action=action),),
        explains_failure=case.failed,
    )


def _said(case: RunCase) -> tuple[str, ...]:
    """Return the log's last lines that speak of an error, or its very last line."""
    lines = case.log_lines(ERROR_LINE) or case.error.strip().splitlines()[-1:]
    return tuple(line[:200] for line in lines[-SHOWN_LINES:])


def _request_words(case: RunCase) -> tuple[str, ...]:
    """Say how many requests ended how."""
    if case.log is None:
        return ()
    counts = Counter(case.log.statuses)
    ended = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    first = next((error for error in case.log.errors if error), "")
    return (f"{len(case.log.statuses)} requests: {ended}", *((f"first: {first}",) if first else ()))


def _longest(case: RunCase) -> int:
    if case.log is not None:
        asked = float(case.run.workload.get("osl") or 0)
        return int(np.nanmax(case.log.isl + np.fmax(case.log.osl, asked)))
    return int((case.run.workload.get("isl") or 0) + (case.run.workload.get("osl") or 0))
