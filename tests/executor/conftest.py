"""One small deployment, and the stand-in programs on the path."""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from cost_models.engine import EngineConfig
from executor.backend import Launch, ModelSource

STAND_INS = Path(__file__).parent / "stand_ins"

TEST_RUN = uuid.uuid4().hex
"""In the environment of everything that these tests start: another run may go on beside."""

os.environ["PLANNER_TEST_RUN"] = TEST_RUN

DATA = Path(__file__).parents[1] / "data"

TINY_LLAMA: dict[str, Any] = json.loads((DATA / "tiny-llama" / "config.json").read_text())

TINY_MODEL = ModelSource(
    name="tiny",
    hub_name="tiny/tiny",
    hf_config=TINY_LLAMA,
    has_random_weights=True,
    vocab_size=256,
    max_position_embeddings=256,
)


def tiny_deployment(workdir: Path, **changes: Any) -> Launch:
    config = EngineConfig(
        max_batch_size=4,
        max_num_tokens=128,
        max_seq_len=128,
        tokens_per_block=16,
        enable_chunked_prefill=True,
        kv_cache_max_tokens=1024,
        # What vLLM does, and cannot be told.
        capacity_scheduler_policy="RECOMPUTE",
        cuda_graph_padding=True,
    )
    fields: dict[str, Any] = {"model": TINY_MODEL, "config": config, "workdir": workdir}
    return Launch(**{**fields, **changes})


@pytest.fixture
def deployment(tmp_path: Path) -> Launch:
    return tiny_deployment(tmp_path / "work")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the engines that are not installed; they run under this interpreter."""
    here = Path(sys.executable).parent
    path = os.pathsep.join([str(STAND_INS), str(here), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
