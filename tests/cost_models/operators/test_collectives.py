"""All-reduce and NCCL collectives: the physics of the forms and their fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.fitting.collectives import (
    fit_allreduce,
    fit_nccl,
    predict_allreduce,
    predict_nccl,
)
from cost_models.operators.collectives import (
    AllReduceParams,
    NcclParams,
    allreduce_seconds,
    nccl_seconds,
)
from cost_models.operators.fit import params_from_json, params_to_json
from cost_models.tables import Table, read_table, select
from tests.cost_models.operators.hopper import H100 as GPU

SHARED = Path(__file__).parents[3] / ".." / "shared" / "silicon"

ALLREDUCE = AllReduceParams(
    one_shot_s=3e-6,
    one_shot_efficiency=0.7,
    two_shot_s=2e-5,
    two_shot_efficiency=0.8,
    rank_s=1e-7,
)

NCCL = NcclParams(latency_s=1e-5, rank_s=1e-6, efficiency=0.8, norm=0.8, passes=2.0)

message = st.floats(1.0, 1e10)
ranks = st.integers(1, 72)


def test_one_rank_sends_nothing() -> None:
    assert allreduce_seconds(1e6, 1, gpu=GPU, params=ALLREDUCE) == 0
    assert nccl_seconds(1e6, 1, gpu=GPU, params=NCCL) == 0


def test_an_empty_message_is_not_sent() -> None:
    assert allreduce_seconds(0, 8, gpu=GPU, params=ALLREDUCE) == 0
    assert nccl_seconds(0, 8, gpu=GPU, params=NCCL) == 0


@given(size=message, num_gpus=ranks, factor=st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(size: float, num_gpus: int, factor: float) -> None:
    faster = replace(GPU, link_bytes_per_s=GPU.link_bytes_per_s * factor)
    slack = 1 + 1e-12
    assert (
        allreduce_seconds(size, num_gpus, gpu=faster, params=ALLREDUCE)
        <= allreduce_seconds(size, num_gpus, gpu=GPU, params=ALLREDUCE) * slack
    )
    assert (
        nccl_seconds(size, num_gpus, gpu=faster, params=NCCL)
        <= nccl_seconds(size, num_gpus, gpu=GPU, params=NCCL) * slack
    )


@given(size=message, num_gpus=ranks, more=st.floats(1.0, 100.0))
def test_larger_messages_and_more_ranks_are_never_faster(
    size: float, num_gpus: int, more: float
) -> None:
    slack = 1 - 1e-12
    before = allreduce_seconds(size, num_gpus, gpu=GPU, params=ALLREDUCE)
    assert allreduce_seconds(size * more, num_gpus, gpu=GPU, params=ALLREDUCE) >= before * slack
    assert allreduce_seconds(size, num_gpus + 1, gpu=GPU, params=ALLREDUCE) >= before * slack
    nccl = nccl_seconds(size, num_gpus, gpu=GPU, params=NCCL)
    assert nccl_seconds(size * more, num_gpus, gpu=GPU, params=NCCL) >= nccl * slack
    assert nccl_seconds(size, num_gpus + 1, gpu=GPU, params=NCCL) >= nccl * slack


@given(size=st.floats(1e3, 1e9), num_gpus=st.integers(2, 8))
def test_no_kernel_beats_the_link(size: float, num_gpus: int) -> None:
    """Each rank has to send 2 (n-1)/n of the message at least (Patarasuk & Yuan 2009)."""
    least_s = 2 * (num_gpus - 1) / num_gpus * size / GPU.link_bytes_per_s
    assert allreduce_seconds(size, num_gpus, gpu=GPU, params=ALLREDUCE) > least_s
    assert nccl_seconds(size, num_gpus, gpu=GPU, params=NCCL) > least_s


def test_small_messages_go_in_one_shot_and_large_ones_in_two() -> None:
    small = allreduce_seconds(1024, 8, gpu=GPU, params=ALLREDUCE)
    large = allreduce_seconds(1e9, 8, gpu=GPU, params=ALLREDUCE)
    assert small < ALLREDUCE.two_shot_s
    one_shot_s = 7 * 1e9 / (ALLREDUCE.one_shot_efficiency * GPU.link_bytes_per_s)
    assert large < one_shot_s / 3


def test_broadcasts() -> None:
    size, num_gpus = np.logspace(3, 9, 5), np.array([[1], [2], [8]])
    assert allreduce_seconds(size, num_gpus, gpu=GPU, params=ALLREDUCE).shape == (3, 5)
    assert nccl_seconds(size, num_gpus, gpu=GPU, params=NCCL).shape == (3, 5)


def test_allreduce_fit_recovers_what_the_form_simulated_and_survives_json() -> None:
    table = _grid()
    seconds = allreduce_seconds(
        table["message_bytes"], table["num_gpus"], gpu=GPU, params=ALLREDUCE
    )
    table |= {
        "dtype": np.full(seconds.size, "bfloat16"),
        "framework_version": np.full(seconds.size, "1.3.0"),
        "latency_us": seconds * 1e6,
    }
    fits = fit_allreduce(table, GPU)
    params = fits["bfloat16"].params
    assert params.one_shot_s == pytest.approx(ALLREDUCE.one_shot_s, rel=0.05)
    assert params.one_shot_efficiency == pytest.approx(0.7, rel=0.05)
    assert params.two_shot_efficiency == pytest.approx(0.8, rel=0.05)
    assert predict_allreduce(table, GPU, fits) == pytest.approx(seconds, rel=0.01)
    again = params_from_json(AllReduceParams, json.loads(json.dumps(params_to_json(params))))
    assert allreduce_seconds(3e5, 4, gpu=GPU, params=again) == pytest.approx(
        allreduce_seconds(3e5, 4, gpu=GPU, params=params), rel=1e-3
    )


def test_nccl_fit_recovers_what_the_form_simulated() -> None:
    table = _grid()
    seconds = nccl_seconds(table["message_bytes"], table["num_gpus"], gpu=GPU, params=NCCL)
    table |= {
        "collective": np.full(seconds.size, "all_reduce"),
        "dtype": np.full(seconds.size, "half"),
        "nccl_version": np.full(seconds.size, "2.27"),
        "latency_us": seconds * 1e6,
    }
    fits = fit_nccl(table, GPU)
    assert list(fits) == ["all_reduce/half"]
    params = fits["all_reduce/half"].params
    assert params.efficiency == pytest.approx(NCCL.efficiency, rel=0.05)
    assert params.norm == pytest.approx(NCCL.norm, rel=0.05)
    assert predict_nccl(table, GPU, fits) == pytest.approx(seconds, rel=0.01)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no operator tables beside the repository")
def test_message_sizes_left_out_stay_inside_the_bound() -> None:
    table = read_table(SHARED / "allreduce_custom.parquet")
    table = select(table, table["system"] == "h200_sxm")
    left_out = np.log2(table["message_bytes"].astype(np.float64)).astype(int) % 4 == 1
    fits = fit_allreduce(select(table, ~left_out), GPU)
    unseen = select(table, left_out)
    measured_s = unseen["latency_us"].astype(np.float64) * 1e-6
    error = np.abs(predict_allreduce(unseen, GPU, fits) / measured_s - 1)
    assert error.size > 10
    assert error.mean() * 100 < 4.0


def _grid() -> Table:
    size, num_gpus = np.meshgrid(2.0 ** np.arange(8, 31), np.array([2, 4, 8]))
    return {"message_bytes": size.ravel(), "num_gpus": num_gpus.ravel()}
