"""A model folder without weights: for engines that make up random ones."""

from __future__ import annotations

import json
from pathlib import Path

from cost_models.errors import ConfigError
from executor.backend import ModelSource


def write_model_folder(model: ModelSource, parent: Path) -> Path:
    """Write config.json and a tokenizer of words t0, t1, ... and return the folder.

    Raises:
        ConfigError: The model's config.json is not known here.
    """
    folder = write_config_folder(model, parent)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(model.vocab_size)))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"})
    )
    return folder


def write_config_folder(model: ModelSource, parent: Path) -> Path:
    """Write config.json alone and return its folder.

    Raises:
        ConfigError: The model's config.json is not known here.
    """
    if not model.hf_config:
        raise ConfigError(
            f"{model.name}: random weights need its config.json", hint="give --model CONFIG.json"
        )
    folder = parent / f"model-{model.label}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.hf_config, indent=1))
    return folder


def _tokenizer(vocab_size: int) -> dict[str, object]:
    """One word a token, in the file format of Hugging Face tokenizers."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(vocab_size)},
            "unk_token": "t0",
        },
    }
