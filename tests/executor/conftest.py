"""One small deployment, and the stand-in programs on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cost_models.engine import EngineConfig
from executor.backend import Deployment, ModelSource

STAND_INS = Path(__file__).parent / "stand_ins"

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

TINY_MODEL = ModelSource(
    name="tiny",
    hub_name="tiny/tiny",
    hf_config=TINY_LLAMA,
    has_random_weights=True,
    vocab_size=256,
    max_position_embeddings=256,
)


def tiny_deployment(workdir: Path, **changes: Any) -> Deployment:
    config = EngineConfig(
        max_batch_size=4,
        max_num_tokens=128,
        max_seq_len=128,
        tokens_per_block=16,
        enable_chunked_prefill=True,
        kv_cache_max_tokens=1024,
    )
    fields: dict[str, Any] = {"model": TINY_MODEL, "config": config, "workdir": workdir}
    return Deployment(**{**fields, **changes})


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return tiny_deployment(tmp_path / "work")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the engines that are not installed; they run under this interpreter."""
    here = Path(sys.executable).parent
    path = os.pathsep.join([str(STAND_INS), str(here), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
