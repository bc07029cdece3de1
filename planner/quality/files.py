"""Reads the published losses and the user's own measurements, and keeps new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cost_models.errors import ConfigError, ProfileError
from cost_models.model import ModelSpec
from cost_models.precision import KV_DTYPES, QUANTIZATIONS
from cost_models.profile_io import read_json_object, read_yaml_object
from cost_models.weights import parameter_count
from planner.own_calibrations import SHIPPED, own_folder
from planner.quality.table import (
    NORMAL_Q95,
    Observation,
    QualityLoss,
    QualityTable,
    Source,
    pooled,
)

Published = Mapping[str, Mapping[str, tuple[Observation, ...]]]

MEASURE = "perplexity_loss_pct"
"""The estimate of `planner quality` that a plan takes."""


def load_quality(model: ModelSpec, calibration: str = "") -> QualityTable:
    """Return the losses of a model: its own measurements, then what is published.

    Args:
        model: Whose size decides which observations count.
        calibration: `shipped` leaves out what the user has measured.

    Raises:
        ProfileError: A file is damaged.
    """
    published = _published()
    size = float(parameter_count(model))
    return QualityTable(
        weights={name: pooled(found, size) for name, found in published["weights"].items()},
        kv_cache={name: pooled(found, size) for name, found in published["kv_cache"].items()},
        measured={} if calibration == SHIPPED else _measured(own_file(model)),
        native=model.checkpoint_quantization,
    )


def own_file(model: ModelSpec) -> Path:
    """Return where the user's measurements of a model lie."""
    return own_folder().parent / "quality" / f"{model.name}.json"


def install(report: Mapping[str, Any], model: ModelSpec) -> Path:
    """Let plans of a model take a report of `planner quality`; one of the same pair is replaced.

    Raises:
        ConfigError: The report does not say which precisions were judged.
    """
    from planner.files import write_text  # noqa: PLC0415  help must not wait

    quantization, kv = report["precision"], report["kv_cache_dtype"]
    if quantization not in QUANTIZATIONS or kv not in KV_DTYPES:
        raise ConfigError(
            f"--install: {report['model']} does not say which quantization it holds",
            hint="judge a folder that planner quantize wrote",
        )
    path = own_file(model)
    known = read_json_object(path)["measured"] if path.exists() else []
    kept = [
        one for one in known if (one["quantization"], one["kv_cache_dtype"]) != (quantization, kv)
    ]
    entry = {"quantization": quantization, "kv_cache_dtype": kv, **_entry(report)}
    data = {"schema_version": 1, "model": model.name, "measured": [*kept, entry]}
    write_text(path, json.dumps(data, indent=1) + "\n")
    return path


def loss_of(report: Mapping[str, Any]) -> QualityLoss:
    """Return what a report of `planner quality` measured, as plans take it."""
    return _as_loss(_entry(report))


def _entry(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "estimate": report["estimates"][MEASURE],
        "num_tokens": report["num_tokens"],
        "source": report["model"],
    }


@cache
def _published() -> Published:
    path = Path(str(files("profiles"))) / "quality" / "published.yaml"
    data = read_yaml_object(path)
    weights, kv_cache = (_observations(data[part], path) for part in ("weights", "kv_cache"))
    weights |= {name: weights[other] for name, other in data["same_as"].items()}
    return {"weights": weights, "kv_cache": kv_cache}


def _observations(rows: Mapping[str, Any], path: Path) -> dict[str, tuple[Observation, ...]]:
    try:
        return {
            name: tuple(Observation(**one) for one in row["observations"])
            for name, row in rows.items()
        }
    except (KeyError, TypeError) as error:
        raise ProfileError(f"{path}: {error}") from None


def _measured(path: Path) -> dict[tuple[str, str], QualityLoss]:
    if not path.exists():
        return {}
    try:
        return {
            (one["quantization"], one["kv_cache_dtype"]): _as_loss(one)
            for one in read_json_object(path)["measured"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: damaged ({error!r})", hint="delete it") from None


def _as_loss(entry: Mapping[str, Any]) -> QualityLoss:
    low, high = entry["estimate"]["interval_90"]
    return QualityLoss(
        loss_pct=float(entry["estimate"]["value"]),
        spread_pct=(high - low) / 2 / NORMAL_Q95,
        provenance=Source.MEASURED,
        sources=(f"planner quality on {entry['source']}, {entry['num_tokens']:,} tokens",),
    )
