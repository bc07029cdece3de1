"""Lengths in a workload file: distributions, numbers alone, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.errors import ProfileError
from planner.workloads.model import Workload
from planner.workloads.workload import load_workload


def loaded(folder: Path, isl: Any) -> Workload:
    file = folder / "w.json"
    arrival = {"process": "closed_loop", "concurrency": 8}
    content = {"schema_version": 1, "name": "w", "model": "m", "arrival": arrival, "osl": 256}
    file.write_text(json.dumps(content | {"isl": isl}))
    return load_workload(str(file))


def test_a_number_alone_is_the_length_of_every_request(tmp_path: Path) -> None:
    workload = loaded(tmp_path, 1024)
    rng = np.random.default_rng(0)
    assert set(workload.isl.sample(rng, 50).tolist()) == {1024}
    assert set(workload.osl.sample(rng, 50).tolist()) == {256}


@pytest.mark.parametrize(
    ("isl", "words"),
    [
        ({"tokens": 3}, "isl lacks its 'kind'; write a number"),
        ({"kind": "normal"}, "'fixed', 'lognormal', 'quantiles', 'empirical'"),
        (True, "isl"),
        (0, "isl.fixed.tokens"),
        ("long", "isl"),
    ],
)
def test_other_lengths_are_refused_in_one_line(tmp_path: Path, isl: Any, words: str) -> None:
    with pytest.raises(ProfileError) as refused:
        loaded(tmp_path, isl)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
