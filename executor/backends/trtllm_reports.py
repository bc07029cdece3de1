"""Reads what trtllm-bench writes: report, requests and iteration log.

The formats are those of TensorRT-LLM 1.2's `bench/dataclasses/reporting.py` and `statistics.py`
as documented; no file of an installation has been read yet.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cost_models.errors import ProfileError
from executor.records import MeasuredRequest, RequestStatus

NANOSECOND_S = 1e-9

PERCENTILES: Mapping[str, str] = {
    "mean": "average", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99",
}  # fmt: skip
"""Names in a run's `measured`, and in a report; the oldest reports have no p90."""


def read_report(path: Path) -> dict[str, Any]:
    """Return a `--report_json` as a run's `measured` section.

    `issue_rate` is left out: the report calls it a rate, and it is none.

    Raises:
        ProfileError: Missing, or not a report.
    """
    report = _json(path)
    try:
        performance = report["performance"]
        measured = {
            "e2el_ms": _percentiles(performance["request_latency_percentiles_ms"]),
            "output_tok_per_s": performance["system_output_throughput_tok_s"],
            "request_per_s": performance["request_throughput_req_s"],
            "duration_s": performance["total_latency_ms"] / 1e3,
        }
        streaming = report.get("streaming_metrics")
        if streaming:
            measured["ttft_ms"] = _percentiles(streaming["ttft_percentiles"])
            measured["tpot_ms"] = _percentiles(streaming["tpot_percentiles"])
    except (KeyError, TypeError) as error:
        raise ProfileError(f"{path}: not a report of trtllm-bench ({error!r})") from None
    acceptance = (report.get("decoding_stats") or {}).get("acceptance_length_percentiles")
    if acceptance:
        measured["acceptance_length"] = _percentiles(acceptance)
    return measured


def report_version(path: Path) -> str:
    """Return the version of TensorRT-LLM that a report names."""
    return str((_json(path).get("engine") or {}).get("version") or "")


def read_request_report(path: Path) -> tuple[MeasuredRequest, ...]:
    """Return a `--request_json` as measured requests, in order of arrival.

    The file holds first and last token of each request, so a request has two chunks: gaps
    between tokens are not known.

    Raises:
        ProfileError: Missing, or not a request report.
    """
    rows = _json(path)
    try:
        start_ns = min(float(row["start_timestamp"]) for row in rows)
        found = [_request(row, start_ns) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: not a request report of trtllm-bench ({error!r})") from None
    return tuple(sorted(found, key=lambda request: request.arrival_s))


def read_iteration_log(path: Path) -> list[dict[str, Any]]:
    """Return one mapping an iteration; the lines are Python's own notation, not JSON.

    Raises:
        ProfileError: Missing, or a line is something else.
    """
    iterations = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = ast.literal_eval(line)
        except (ValueError, SyntaxError) as error:
            raise ProfileError(f"{path}: line {number} is no iteration ({error})") from None
        if isinstance(value, dict):
            iterations.append(value)
    return iterations


def iteration_summary(iterations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what a run keeps of an iteration log; what the log does not say is left out."""
    summary = {"num_iterations": float(len(iterations))}
    latencies_ms = [float(row["iterLatencyMS"]) for row in iterations if "iterLatencyMS" in row]
    if latencies_ms:
        summary["iteration_ms_mean"] = sum(latencies_ms) / len(latencies_ms)
    batching = [row.get("inflightBatchingStats") or {} for row in iterations]
    paused = [float(row["numPausedRequests"]) for row in batching if "numPausedRequests" in row]
    if paused:
        summary["num_preemptions"] = sum(paused)
    return summary


def _request(row: Mapping[str, Any], start_ns: float) -> MeasuredRequest:
    sent_ns, end_ns = float(row["start_timestamp"]), float(row["end_timestamp"])
    first_ns = float(row.get("first_token_timestamp") or end_ns)
    osl = int(row["num_total_output_tokens"])
    failed = bool(row.get("error_tokens"))
    times_s = ((first_ns - sent_ns) * NANOSECOND_S, (end_ns - sent_ns) * NANOSECOND_S)
    several = osl > 1
    return MeasuredRequest(
        arrival_s=(sent_ns - start_ns) * NANOSECOND_S,
        isl=int(row["num_input_tokens"]),
        osl=osl,
        chunk_s=times_s if several else times_s[1:],
        chunk_tokens=(1, osl - 1) if several else (osl,),
        status=RequestStatus.REFUSED if failed else RequestStatus.OK,
        error=f"{row['error_tokens']} wrong tokens" if failed else "",
    )


def _percentiles(values: Mapping[str, Any]) -> dict[str, float]:
    return {ours: float(values[theirs]) for ours, theirs in PERCENTILES.items() if theirs in values}


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise ProfileError(f"{path}: not JSON ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
