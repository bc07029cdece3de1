"""`planner quantize`: a model folder in, a quantized model folder out, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cost_models.errors import ConfigError, ProfileError
from cost_models.profile_io import read_json_object
from executor.models import load_model, load_tokenizer, pick_device
from executor.quantization import modelopt, packed
from executor.quantization.calibration import CalibrationSize, token_batches
from executor.quantization.marker import mark
from executor.quantization.schemes import Form, Scheme, check_kv_cache_dtype, scheme
from executor.texts import read_texts

COPIED = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files of the model that stay as they are, beside its tokenizer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """What is to be quantized, how, and where it goes."""

    model: Path
    scheme: str
    calibration_data: Path
    out: Path
    kv_cache_dtype: str = "bf16"
    size: CalibrationSize = field(default_factory=CalibrationSize)
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A checkpoint that was written."""

    folder: Path
    scheme: Scheme
    kv_cache_dtype: str
    calibration_tokens: int
    bytes_before: int
    bytes_after: int
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "folder": str(self.folder),
            "scheme": self.scheme.name,
            "quantization": self.scheme.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "form": str(self.scheme.form),
            "loaded_by": dict(self.scheme.loaded_by),
            "calibration_tokens": self.calibration_tokens,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "wall_s": round(self.wall_s, 2),
        }


def quantize(request: QuantizeRequest) -> Quantized:
    """Quantize a model folder and return what was written.

    Raises:
        PlannerError: Wrong input, a package that is missing, or a model that the scheme is not for.
    """
    row = scheme(request.scheme)
    check_kv_cache_dtype(row, request.kv_cache_dtype)
    source = _checked_source(request.model)
    _check_target(request.out)
    texts = read_texts(request.calibration_data)
    started = time.monotonic()
    batches = token_batches(texts, load_tokenizer(request.model), request.size)
    model = load_model(request.model, pick_device(request.device))
    _refuse_sizes(model, row)
    model = modelopt.calibrate(model, row, request.kv_cache_dtype, batches)
    _write_whole(model, row, source=source, request=request)
    return Quantized(
        folder=request.out,
        scheme=row,
        kv_cache_dtype=request.kv_cache_dtype,
        calibration_tokens=sum(batch.numel() for batch in batches),
        bytes_before=_weight_bytes(request.model),
        bytes_after=_weight_bytes(request.out),
        wall_s=time.monotonic() - started,
    )


def _checked_source(folder: Path) -> dict[str, Any]:
    """Return the model's config.json, if it is one that can be quantized.

    Raises:
        ProfileError: No model folder.
        ConfigError: It is quantized already.
    """
    if not folder.is_dir():
        raise ProfileError(f"--model {folder}: not a folder", hint="download the checkpoint first")
    config = read_json_object(folder / "config.json")
    if "quantization_config" in config or (folder / "hf_quant_config.json").exists():
        raise ConfigError(
            f"--model {folder}: is quantized already", hint="start from the BF16 checkpoint"
        )
    return config


def _check_target(folder: Path) -> None:
    if folder.exists():
        raise ProfileError(f"--out {folder}: exists", hint="name a new folder")


def _refuse_sizes(model: Any, row: Scheme) -> None:
    """Refuse a model whose linear layers do not divide into the scheme's groups.

    Raises:
        ConfigError: With the first layer that does not.
    """
    import torch  # noqa: PLC0415  optional

    if row.form is not Form.MODELOPT and _has_experts(model.config):
        raise ConfigError(
            f"--scheme {row.name} is not for this model: its experts are not linear layers here",
            hint="take fp8 or nvfp4",
        )
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        if any(n % d for n, d in zip(module.weight.shape, row.divisors, strict=True)):
            shape, divisors = (
                "x".join(map(str, pair)) for pair in (module.weight.shape, row.divisors)
            )
            raise ConfigError(
                f"--scheme {row.name} is not for this model: {name} is {shape}, "
                f"not in multiples of {divisors}"
            )


def _has_experts(config: Any) -> bool:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


def _write_whole(
    model: Any, row: Scheme, *, source: Mapping[str, Any], request: QuantizeRequest
) -> None:
    """Write beside the target and rename, so that no half-written folder ever bears its name."""
    request.out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{request.out.name}-", dir=request.out.parent))
    try:
        if row.form is Form.MODELOPT:
            modelopt.export(model, beside)
            described = read_json_object(beside / "config.json")["quantization_config"]
        else:
            described = packed.write(model, row, beside)
        # The model's own config.json: transformers 5 would spell rope_theta in a way that the
        # transformers 4 of TensorRT-LLM 1.2 silently reads as its default.
        config = dict(source) | {"quantization_config": described}
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _copy_rest(request.model, beside)
        mark(beside, row, request.kv_cache_dtype)
        beside.chmod(0o755)
        os.rename(beside, request.out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _copy_rest(model: Path, target: Path) -> None:
    """Copy tokenizer and generation settings as they are."""
    for path in model.iterdir():
        if path.name in COPIED or path.name.startswith(("tokenizer", "vocab", "merges")):
            shutil.copy2(path, target / path.name)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
