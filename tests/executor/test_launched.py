"""What is read of a launched server's metrics page."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from executor.backends.launched import labelled_values, metric_values

USED = "vllm:kv_cache_usage_perc"

PAGE = f"""\
# HELP {USED} KV-cache usage.
# TYPE {USED} gauge
{USED}{{engine="0"}} 0.25
{USED}{{engine="1"}} 0.5 1733000000000
{USED}{{engine="2"}} NaN
{USED}{{engine="3",model_name="a {{b}} \\"c\\""}} 1e-1
{USED}_max 9
this line is not Prometheus'
# TYPE vllm:accepted counter
vllm:accepted_total{{model="m",position="0"}} 3.0 1733000000000
vllm:accepted_total{{model="n",position="0"}} 4
vllm:accepted_total{{position="1",model="m"}} +Inf
vllm:accepted_total{{model="m",position="2"}} 1.5e+06
vllm:accepted_total{{model="m"}} 7
vllm:bare 2 1733000000000
vllm:broken{{engine="0" 3
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_values_over_all_labels(newline: str) -> None:
    page = PAGE.replace("\n", newline)
    assert metric_values(page, USED) == [0.25, 0.5, 0.1]
    assert metric_values(page, "vllm:bare") == [2.0]
    assert metric_values(page, "vllm:accepted_total") == [3.0, 4.0, 1.5e6, 7.0]
    for absent in ("vllm:accepted", "vllm:broken", "vllm:unknown"):
        assert metric_values(page, absent) == []


def test_values_by_a_label() -> None:
    found = labelled_values(PAGE, "vllm:accepted_total", label="position")
    assert found == {"0": 7.0, "2": 1.5e6}


@given(
    values=st.dictionaries(st.text(max_size=8), st.floats() | st.integers(0, 10**9), max_size=5),
)
def test_what_the_python_client_writes_is_read_back(values: dict[str, float]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("used", "KV cache in use", ["engine"], registry=registry)
    counter = Counter("drafts", "Drafts", ["engine"], registry=registry)
    for engine, value in values.items():
        gauge.labels(engine).set(value)
        counter.labels(engine).inc(2)
    page = generate_latest(registry).decode()
    finite = {engine: value for engine, value in values.items() if math.isfinite(value)}
    assert labelled_values(page, "used", label="engine") == finite
    assert sorted(metric_values(page, "used")) == sorted(finite.values())
    assert metric_values(page, "drafts_total") == [2.0] * len(values)
