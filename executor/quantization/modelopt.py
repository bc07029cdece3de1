"""NVIDIA ModelOpt: inserts quantizers, calibrates them, exports what it can export.

It is imported late, says so in one line where it is missing, and is kept from talking on stdout.
The base package suffices: its `hf` extra pins an older transformers for examples we do not use.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cost_models.errors import MeasurementError
from executor.quantization.schemes import KV_PRESETS, Scheme

INSTALL = "pip install 'trtllm-planner[quantization]'"


def calibrate(model: Any, row: Scheme, kv_cache_dtype: str, batches: list[Any]) -> Any:
    """Return the model with calibrated quantizers in its linear layers and its KV cache.

    Raises:
        MeasurementError: ModelOpt is missing or fails.
    """
    with _quiet():
        mtq = _modelopt()
        if model.device.type == "cuda":
            _check_kernels()
        config = _config(mtq, row, kv_cache_dtype)

        def forward_loop(quantized: Any) -> None:
            for batch in batches:
                quantized(batch.to(quantized.device), use_cache=False)

        try:
            return mtq.quantize(model, config, forward_loop)
        except (RuntimeError, ValueError, AssertionError, AttributeError, KeyError) as error:
            raise _failed(f"calibrating {row.name}", error) from error


def export(model: Any, folder: Path) -> None:
    """Write ModelOpt's unified checkpoint.

    Raises:
        MeasurementError: ModelOpt does not export this model.
    """
    with _quiet():
        _modelopt()
        from modelopt.torch.export import export_hf_checkpoint  # noqa: PLC0415

        try:
            export_hf_checkpoint(model, export_dir=folder)
        except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            raise _failed("exporting", error) from error


def quantized_linears(model: Any) -> dict[str, Any]:
    """Return the linear layers whose weights are quantized, by name."""
    from modelopt.torch.quantization.utils import is_quantized_linear  # noqa: PLC0415

    return {
        name: module
        for name, module in model.named_modules()
        if is_quantized_linear(module) and module.weight_quantizer.is_enabled
    }


def _config(mtq: Any, row: Scheme, kv_cache_dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, row.preset))
    config["quant_cfg"] += [
        {"quantizer_name": f"{pattern}input_quantizer", "enable": False}
        for pattern in row.unsmoothed
    ]
    if row.algorithm is not None:
        config["algorithm"] = dict(row.algorithm)
    if KV_PRESETS[kv_cache_dtype]:
        config["quant_cfg"] += copy.deepcopy(getattr(mtq, KV_PRESETS[kv_cache_dtype])["quant_cfg"])
    return config


def _modelopt() -> Any:
    try:
        import modelopt.torch.quantization as mtq  # noqa: PLC0415
    except ImportError as error:
        missing = error.name or str(error)
        raise MeasurementError(f"{missing} is not installed", hint=INSTALL) from error
    return mtq


def _check_kernels() -> None:
    """Build ModelOpt's CUDA kernels, a minute the first time: integer rounding has no other.

    Raises:
        MeasurementError: They cannot be built here.
    """
    from modelopt.torch.quantization.extensions import get_cuda_ext  # noqa: PLC0415

    try:
        get_cuda_ext(raise_if_failed=True)
    except RuntimeError as error:
        raise MeasurementError(
            "ModelOpt's CUDA kernels cannot be built here",
            hint="install nvcc, or take --device cpu",
        ) from error


def _failed(what: str, error: Exception) -> MeasurementError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return MeasurementError(f"ModelOpt failed while {what}: {reason}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send ModelOpt's chat to stderr, and drop its warnings about what we do on purpose."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
