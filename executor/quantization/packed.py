"""Writes what ModelOpt calibrated in the forms that it does not export itself.

ModelOpt's own INT8 and GPTQ exports are for TensorRT-LLM's legacy engine builder, and its FP8
blocks lose their shape where a weight is one block. Here the same quantized weights are laid out
as compressed-tensors (vLLM, transformers) and as FP8 blocks of DeepSeek's form (all three).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cost_models.errors import ConfigError
from executor.quantization.modelopt import quantized_linears
from executor.quantization.schemes import FP8_BLOCK, Form, Scheme

FP8_LARGEST = 448.0
"""Of E4M3."""

SMOOTHED_BY = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
"""Norms of a decoder layer, and the linear layers that read them."""


def write(model: Any, row: Scheme, folder: Path) -> dict[str, Any]:
    """Write the weights, and return the `quantization_config` that describes them.

    Raises:
        ConfigError: The model's layers are not ones that the scheme can be written for.
    """
    from huggingface_hub import save_torch_state_dict  # noqa: PLC0415  comes with transformers

    linears = quantized_linears(model)
    if row.name == "int8_sq":
        fold_smoothing(model)
    tensors = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if "_quantizer" not in name and name.removesuffix(".weight") not in linears
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, module in linears.items():
        parts = _packed(module, row)
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in parts.items()}
    scales = dict(_kv_scales(model, row))
    tensors |= scales
    on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
    save_torch_state_dict(on_host, folder, metadata={"format": "pt"})
    return quantization_config(model, row, linears, has_kv_scales=bool(scales))


def quantization_config(
    model: Any, row: Scheme, linears: dict[str, Any], *, has_kv_scales: bool
) -> dict[str, Any]:
    """Return what config.json says of the weights."""
    import torch  # noqa: PLC0415  optional

    skipped = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in linears
    ]
    if row.form is Form.FP8_BLOCKS:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "modules_to_not_convert": skipped,
        }
    weights = {
        "num_bits": row.num_bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if row.group_size else "channel",
        "group_size": row.group_size or None,
    }
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    layout = "int-quantized" if row.int8_activations else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": tokens if row.int8_activations else None,
        "output_activations": None,
        "format": layout,
    }
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": skipped,
        "kv_cache_scheme": kv if has_kv_scales else None,
    }


def fold_smoothing(model: Any) -> None:
    """Let the norms of each decoder layer divide by what SmoothQuant multiplied the weights with.

    Layers that read one norm get one smoothing: the mean of theirs, as ModelOpt does for AWQ.

    Raises:
        ConfigError: The model's layers are not built that way.
    """
    for layer in model.model.layers:
        for norm_name, names in SMOOTHED_BY:
            try:
                norm = layer.get_submodule(norm_name)
                linears = [layer.get_submodule(name) for name in names]
                smoothing = [linear.input_quantizer.pre_quant_scale.float() for linear in linears]
            except AttributeError:
                raise ConfigError(
                    "--scheme int8_sq is not for this model: "
                    f"it has no {norm_name} before {', '.join(names)}"
                ) from None
            _fold(norm, linears, smoothing)


def _fold(norm: Any, linears: list[Any], smoothing: list[Any]) -> None:
    import torch  # noqa: PLC0415  optional

    before = norm.weight.float()
    folded = (before * torch.stack(smoothing).mean(dim=0)).to(norm.weight.dtype)
    # What the rounded norm does is undone exactly; a dead channel stays as it is.
    common = torch.where(before == 0, torch.ones_like(before), folded.float() / before)
    norm.weight.data = folded
    for linear, own in zip(linears, smoothing, strict=True):
        linear.weight.data = (linear.weight.float() * own / common).to(linear.weight.dtype)


def _packed(module: Any, row: Scheme) -> dict[str, Any]:
    if row.form is Form.FP8_BLOCKS:
        return fp8_blocks(module.weight.float())
    return integers(module, row)


def fp8_blocks(weight: Any) -> dict[str, Any]:
    """Return a weight in FP8 and the scale of each of its blocks."""
    import torch  # noqa: PLC0415  optional

    rows, columns = (size // FP8_BLOCK for size in weight.shape)
    blocks = weight.reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_LARGEST
    stored = (blocks / scale[:, None, :, None]).reshape(weight.shape)
    return {"weight": stored.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def integers(module: Any, row: Scheme) -> dict[str, Any]:
    """Return a weight as integers with their scales, packed unless activations are INT8 too."""
    import torch  # noqa: PLC0415  optional

    weight = module.weight.float()
    largest = 2 ** (row.num_bits - 1) - 1
    groups = weight.reshape(weight.shape[0], -1, row.group_size or weight.shape[1])
    # GPTQ and smoothing moved the weights; GPTQ's were rounded to the scales of before.
    amax = groups.abs().amax(dim=-1)
    if row.algorithm is not None:
        amax = module.weight_quantizer.amax.float().reshape(amax.shape)
    scale = (amax.clamp(min=1e-12) / largest).to(module.weight.dtype)
    values = (groups / scale.float()[:, :, None]).round().clamp(-largest - 1, largest)
    stored = values.reshape(weight.shape).to(torch.int8)
    if row.int8_activations:
        return {"weight": stored, "weight_scale": scale}
    from compressed_tensors.compressors.pack_quantized.helpers import (  # noqa: PLC0415
        pack_to_int32,
    )

    return {
        "weight_packed": pack_to_int32(stored, row.num_bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _kv_scales(model: Any, row: Scheme) -> Iterator[tuple[str, Any]]:
    """Yield the scale of every key and value cache that was calibrated, by its tensor's name."""
    for name, module in model.named_modules():
        for part in ("k", "v"):
            quantizer = getattr(module, f"{part}_bmm_quantizer", None)
            if quantizer is None or not quantizer.is_enabled:
                continue
            inner = f"{part}_proj." if row.form is Form.FP8_BLOCKS else ""
            yield f"{name}.{inner}{part}_scale", (quantizer.amax.float() / FP8_LARGEST).reshape(1)
