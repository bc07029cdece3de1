"""Reads and writes calibration files: fitted operators per GPU, step constants per engine.

`profiles/calibrations/<gpu>/<engine>-<version>.json` holds one GPU's operators;
`profiles/calibrations/engines/<engine>.json` holds what belongs to an engine and its
host. A user's own file may hold either part and is laid over the shipped ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cost_models.acceptance import Acceptance
from cost_models.borrowing import BorrowedNames, CompletedFits, Lenders
from cost_models.calibration import (
    Calibration,
    ErrorQuantiles,
    OperatorFits,
    Provenance,
)
from cost_models.engine_traits import EngineTraits
from cost_models.errors import ProfileError
from cost_models.frontend import FrontEndConstants
from cost_models.gpu import GpuSpec
from cost_models.memory import MemoryConstants
from cost_models.operators.attention import DecodeAttentionParams, PrefillAttentionParams
from cost_models.operators.collectives import AllReduceParams, NcclParams
from cost_models.operators.fit import OperatorFit, params_from_json, params_to_json
from cost_models.operators.gemm import GemmParams
from cost_models.operators.mla import MlaBmmParams, MlaDecodeParams, MlaPrefillParams
from cost_models.operators.moe import MoeParams
from cost_models.step_constants import StepConstants

SCHEMA_VERSION = 1

PARAMS_BY_FAMILY: Mapping[str, type[Any]] = {
    "gemm": GemmParams,
    "attention_prefill": PrefillAttentionParams,
    "attention_decode": DecodeAttentionParams,
    "moe": MoeParams,
    "mla_prefill": MlaPrefillParams,
    "mla_decode": MlaDecodeParams,
    "mla_bmm": MlaBmmParams,
    "allreduce": AllReduceParams,
    "nccl": NcclParams,
}

Operators = dict[str, dict[str, OperatorFit[Any]]]


def read_calibration(
    gpu: GpuSpec,
    engine: EngineTraits,
    constants: Path,
    own: Sequence[str | Path] = (),
    *,
    engine_version: str = "",
) -> Calibration:
    """Return what is known of an engine on a GPU: datasheet, then shipped, then the user's files.

    Args:
        gpu: Where the engine runs.
        engine: The engine, and what is its own.
        constants: The file of its shipped constants.
        own: Calibration files of the user's own, laid over the shipped ones in this order.
        engine_version: Takes the constants that are known to differ in that version.

    Raises:
        ProfileError: A file cannot be read, or is of another GPU or engine.
    """
    shared = read_constants(constants)
    differs = shared["versions"].get(engine_version, {})
    measured = _shipped_operators(gpu.name)
    lenders = Lenders(gpu, _shipped_operators)
    calibration = Calibration(
        gpu=gpu.name,
        traits=engine,
        engine_version=str(shared["engine_version"]),
        provenance=Provenance.CALIBRATED if measured else Provenance.DATASHEET,
        operators=_completed(measured, lenders),
        step=StepConstants(**shared["step"]),
        memory=MemoryConstants(**shared["memory"]),
        front_end=FrontEndConstants(**shared["front_end"] | differs.get("front_end", {})),
        intervals=_intervals(shared["intervals"]),
        borrowed=BorrowedNames(measured, lenders),
        seen_versions=_seen_versions(shared),
        seen_gpus=_seen_gpus(shared),
        sources=tuple(shared["sources"]),
    )
    for path in own:
        calibration = _overlaid(calibration, Path(path))
    return calibration


def operators_to_json(operators: Mapping[str, Mapping[str, OperatorFit[Any]]]) -> dict[str, Any]:
    """Return fitted operators as plain JSON values."""
    return {
        family: {dtype: _fit_to_json(fit) for dtype, fit in fits.items()}
        for family, fits in operators.items()
    }


def operators_from_json(data: Mapping[str, Mapping[str, Any]]) -> Operators:
    """Rebuild fitted operators from `operators_to_json`."""
    return {
        family: {
            dtype: OperatorFit(
                **{**fit, "params": params_from_json(PARAMS_BY_FAMILY[family], fit["params"])}
            )
            for dtype, fit in fits.items()
        }
        for family, fits in data.items()
    }


def read_calibration_file(path: Path) -> dict[str, Any]:
    """Return the JSON object of a calibration file.

    Raises:
        ProfileError: Missing, not JSON, or of another schema version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(f"{path}: not a calibration file ({error})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ProfileError(
            f"{path}: schema_version is {version!r}", hint=f"this version reads {SCHEMA_VERSION}"
        )
    return dict(data)


def calibration_gpus(path: Path) -> tuple[str, ...]:
    """Return the GPUs whose machines taught a file its constants; none where it does not say.

    Raises:
        ProfileError: Not a calibration file.
    """
    return _seen_gpus(read_calibration_file(path))


def calibrated_gpus() -> list[str]:
    """Names of the GPUs that have fitted operators."""
    return sorted(
        entry.name
        for entry in _calibrations().iterdir()
        if entry.is_dir() and entry.name != "engines"
    )


def _calibrations() -> Path:
    return Path(str(files("profiles"))) / "calibrations"


@cache
def read_constants(path: Path) -> dict[str, Any]:
    """Return the constants that are shipped with an engine.

    Raises:
        ProfileError: The file cannot be read.
    """
    return read_calibration_file(path)


@cache
def _shipped_operators(gpu_name: str) -> Operators:
    """Operators fitted on this GPU, empty where there are none. Read once a process."""
    folder = _calibrations() / gpu_name
    merged: Operators = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        for family, fits in operators_from_json(read_calibration_file(path)["operators"]).items():
            merged.setdefault(family, {}).update(fits)
    return merged


def _completed(own: Operators, lenders: Lenders) -> OperatorFits:
    """Fill every family and dtype: the GPU's own fit, else the nearest lender's."""
    return OperatorFits(
        **{
            family: CompletedFits(family, own.get(family, {}), lenders)
            for family in PARAMS_BY_FAMILY
        }
    )


def _overlaid(calibration: Calibration, path: Path) -> Calibration:
    data = read_calibration_file(path)
    for part, kind, present in (
        ("operators", "gpu", calibration.gpu), ("step", "engine", calibration.engine),
    ):  # fmt: skip
        if part in data and data.get(kind, present) != present:
            raise ProfileError(
                f"{path}: holds the {part} of {data[kind]}, not of {present}",
                hint=f"fit one with planner calibrate, or give --{kind} {data[kind]}",
            )
    unknown = set(data.get("step", {})) - {field.name for field in fields(StepConstants)}
    if unknown:
        raise ProfileError(
            f"{path}: this version has no constant {min(unknown)!r}",
            hint="the form of a term has changed since: fit the file anew with planner calibrate",
        )
    gpus = _seen_gpus(data)
    is_of_this_gpu = calibration.gpu in gpus
    fitted = operators_from_json(data.get("operators", {}))
    operators = {
        family: {**getattr(calibration.operators, family), **fits}
        for family, fits in fitted.items()
    }
    return replace(
        calibration,
        operators=replace(calibration.operators, **operators),
        step=replace(calibration.step, **data.get("step", {})),
        memory=replace(calibration.memory, **data.get("memory", {})),
        front_end=replace(calibration.front_end, **data.get("front_end", {})),
        intervals={**calibration.intervals, **_intervals(data.get("intervals", {}))},
        provenance=Provenance.CALIBRATED,
        seen_versions=_seen_versions(data) or calibration.seen_versions,
        seen_gpus=gpus or calibration.seen_gpus,
        knows_host=calibration.knows_host or is_of_this_gpu,
        seen_operators=calibration.seen_operators
        | (_seen_operators(data) if is_of_this_gpu else frozenset()),
        acceptances={**calibration.acceptances, **_acceptances(data.get("acceptances", {}))},
        sources=(*calibration.sources, str(path)),
    )


def _seen_versions(data: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(data.get("data", {}).get("engine_versions", ()))


def _seen_gpus(data: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(data.get("data", {}).get("gpus", ()))


def _seen_operators(data: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(data.get("data", {}).get("operators", ()))


def _intervals(data: Mapping[str, Mapping[str, float]]) -> dict[str, ErrorQuantiles]:
    return {key: ErrorQuantiles(**quantiles) for key, quantiles in data.items()}


def _acceptances(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Acceptance]:
    return {
        key: Acceptance(**{**found, "conditional": tuple(found["conditional"])})
        for key, found in data.items()
    }


def _fit_to_json(fit: OperatorFit[Any]) -> dict[str, Any]:
    record = {field.name: getattr(fit, field.name) for field in fields(fit)}
    record["params"] = params_to_json(fit.params)
    record["covers"] = {name: list(bounds) for name, bounds in fit.covers.items()}
    return record


def engine_constants_to_json(calibration: Calibration) -> dict[str, Any]:
    """Return the engine's part of a calibration as plain JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": calibration.engine,
        "engine_version": calibration.engine_version,
        "step": asdict(calibration.step),
        "memory": asdict(calibration.memory),
        "front_end": asdict(calibration.front_end),
        "intervals": {name: asdict(q) for name, q in calibration.intervals.items()},
        "sources": list(calibration.sources),
    }
