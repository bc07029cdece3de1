"""Reads a quantized checkpoint as the engine that loads it would compute with it.

Weights are unpacked to the model's own precision; what the engine does to activations becomes a
rounding in front of each linear layer. So transformers judges the files themselves, on any machine,
also in forms that it cannot load.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cost_models.errors import ConfigError, ProfileError
from cost_models.profile_io import read_json_object
from executor.models import build_model, load_model
from executor.quality import rounding
from executor.quantization.marker import made_by_planner

INT4_MASK, INT4_SIGN = 0x0F, 0x08

Tensors = Mapping[str, Any]
"""The tensors of one linear layer, by what they are: `weight`, `weight_scale`, ..."""

Rounding = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One linear layer as it is computed with."""

    weight: Any
    rounding: Rounding | None = None
    """What happens to its input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that computes as its engine would, and how its engine keeps the KV cache."""

    model: Any
    quantization: str
    """`none`, or what the checkpoint calls it."""
    precision: str
    """What the planner calls it; empty where the checkpoint is not of our making."""
    kv_cache_dtype: str
    kv_scales: Mapping[str, float] = field(default_factory=dict)
    """By layer and part, as `3.k`; a part that is not named has a scale of 1."""


def load(folder: Path, device: str) -> Loaded:
    """Load a model folder, quantized or not.

    Raises:
        ProfileError: No model, or tensors that do not fit what config.json says.
        ConfigError: A quantization that is not understood.
    """
    if not folder.is_dir():
        raise ProfileError(f"{folder}: not a folder")
    described = _description(folder)
    if not described:
        model = load_model(folder, device)
        return Loaded(model=model, quantization="none", precision="bf16", kv_cache_dtype="bf16")
    unpack = _unpacker(described)
    plain, layers, kv_scales = _read(folder, unpack)
    state = plain | {f"{name}.weight": layer.weight for name, layer in layers.items()}
    model = build_model(folder, device, _bare_config(folder), state)
    _round_inputs(model, layers)
    return Loaded(
        model=model,
        quantization=described["algorithm"],
        kv_cache_dtype=described["kv_cache_dtype"] or ("fp8" if kv_scales else "bf16"),
        precision=made_by_planner(folder),
        kv_scales=kv_scales,
    )


def _description(folder: Path) -> dict[str, Any]:
    """Return what the folder says of its quantization, in one vocabulary; empty for none."""
    config = read_json_object(folder / "config.json").get("quantization_config")
    own = folder / "hf_quant_config.json"
    if own.exists():
        data = read_json_object(own)["quantization"]
        kv = (data.get("kv_cache_quant_algo") or "bf16").lower()
        return {"form": "modelopt", "algorithm": data["quant_algo"], "kv_cache_dtype": kv}
    if config is None:
        return {}
    form = config.get("quant_method", "")
    if form == "fp8" and config.get("weight_block_size"):
        return {"form": form, "algorithm": "fp8_block", "kv_cache_dtype": ""}
    if form == "compressed-tensors":
        kv = "fp8" if config.get("kv_cache_scheme") else "bf16"
        group = config["config_groups"]["group_0"]
        return {"form": form, "algorithm": config["format"], "kv_cache_dtype": kv, "group": group}
    raise ConfigError(
        f"{folder}: quantization {form or config} is not understood",
        hint="known: what planner quantize writes",
    )


def _unpacker(described: Mapping[str, Any]) -> Callable[[Tensors], Stored]:
    """Return what turns the tensors of a layer into what is computed.

    Raises:
        ConfigError: No rule for the quantization.
    """
    if described["form"] == "compressed-tensors":
        return functools.partial(unpack_integers, group=described["group"])
    rules: Mapping[str, Callable[[Tensors], Stored]] = {
        "FP8": unpack_fp8,
        "fp8_block": unpack_fp8_blocks,
        "NVFP4": unpack_nvfp4,
        "W4A16_AWQ": unpack_awq,
        "W4A8_AWQ": unpack_awq,
    }
    if described["algorithm"] not in rules:
        raise ConfigError(
            f"quantization {described['algorithm']} is not understood",
            hint=f"known: {', '.join(rules)}",
        )
    return rules[described["algorithm"]]


def _read(
    folder: Path, unpack: Callable[[Tensors], Stored]
) -> tuple[dict[str, Any], dict[str, Stored], dict[str, float]]:
    """Return tensors that are not quantized, the layers that are, and the KV scales."""
    import torch  # noqa: PLC0415  optional

    tensors = dict(_tensors(folder))
    scaled = {name.rsplit(".", 1)[0] for name in tensors if ".weight_scale" in name}
    parts: dict[str, dict[str, Any]] = {name: {} for name in scaled}
    plain: dict[str, Any] = {}
    kv_scales: dict[str, float] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in ("k_scale", "v_scale"):
            kv_scales[f"{_layer_number(name)}.{part[0]}"] = float(tensor.max())
        elif layer in scaled and part != "bias":
            parts[layer][part] = tensor
        else:
            plain[name] = tensor
    dtype = next((t.dtype for t in plain.values() if t.is_floating_point()), torch.bfloat16)
    layers = {}
    for name, found in parts.items():
        try:
            stored = unpack(found)
        except (KeyError, RuntimeError) as error:
            raise ProfileError(f"{folder}: {name} is not as config.json says ({error})") from error
        layers[name] = Stored(weight=stored.weight.to(dtype), rounding=stored.rounding)
    return plain, layers, kv_scales


def _layer_number(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  comes with transformers

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ProfileError(f"{folder}: holds no *.safetensors")
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ProfileError(f"{path}: damaged ({error})") from error


def _bare_config(folder: Path) -> Any:
    """Return the model's configuration as if it had never been quantized."""
    from transformers import AutoConfig  # noqa: PLC0415  optional

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    return config


def _round_inputs(model: Any, layers: Mapping[str, Stored]) -> None:
    """Round the input of every layer whose engine does.

    Raises:
        ConfigError: A layer is none of this model's, as experts that transformers fuses are.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        if layer.rounding is None:
            continue
        if name not in modules:
            raise ConfigError(f"{name} is no linear layer of the model in transformers")
        modules[name].register_forward_pre_hook(_hook(layer.rounding))


def _hook(rounding_of_input: Rounding) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding_of_input(inputs[0]), *inputs[1:])

    return hook


def unpack_fp8(tensors: Tensors) -> Stored:
    """FP8 with one scale for the weight and a static one for its input."""
    scale = float(tensors["input_scale"])
    return Stored(
        weight=tensors["weight"].float() * tensors["weight_scale"].float().reshape(-1, 1),
        rounding=lambda values: rounding.fp8(values, scale),
    )


def unpack_fp8_blocks(tensors: Tensors) -> Stored:
    """FP8 with a scale for each block; inputs get theirs as they come."""
    scale, weight = tensors["weight_scale_inv"].float(), tensors["weight"].float()
    blocks = weight.unflatten(1, (scale.shape[1], -1)).unflatten(0, (scale.shape[0], -1))
    return Stored(
        weight=(blocks * scale[:, None, :, None]).reshape(weight.shape),
        rounding=rounding.fp8_groups,
    )


def unpack_nvfp4(tensors: Tensors) -> Stored:
    """E2M1, two columns in a byte, with scales for blocks of 16 and one for the tensor."""
    import torch  # noqa: PLC0415  optional

    packed = tensors["weight"]
    codes = torch.stack((packed & INT4_MASK, packed >> 4), dim=-1).flatten(-2).long()
    steps = torch.tensor(rounding.FP4_STEPS)
    values = steps[codes & 0x07] * (1 - 2 * (codes & INT4_SIGN).bool().float())
    scale = tensors["weight_scale"].float() * tensors["weight_scale_2"].float()
    weight = (values.unflatten(1, (-1, rounding.NVFP4_BLOCK)) * scale[..., None]).flatten(1)
    input_scale = float(tensors["input_scale"])
    return Stored(weight=weight, rounding=lambda values: rounding.nvfp4(values, input_scale))


def unpack_awq(tensors: Tensors) -> Stored:
    """INT4 in groups, two rows in a byte; then in FP8 too where activations are FP8."""
    import torch  # noqa: PLC0415  optional

    packed, scale = tensors["weight"], tensors["weight_scale"].float()
    nibbles = torch.stack((packed & INT4_MASK, packed >> 4), dim=1).flatten(0, 1).int()
    values = (nibbles ^ INT4_SIGN) - INT4_SIGN
    weight = (values.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    if "weight_scale_2" in tensors:
        weight = rounding.fp8(weight, float(tensors["weight_scale_2"]))
    return Stored(weight=weight, rounding=_awq_rounding(tensors))


def _awq_rounding(tensors: Tensors) -> Rounding | None:
    smoothing, scale = tensors.get("pre_quant_scale"), tensors.get("input_scale")
    if smoothing is None and scale is None:
        return None

    def apply(values: Any) -> Any:
        if smoothing is not None:
            values = values * smoothing.to(values.device)
        return values if scale is None else rounding.fp8(values, float(scale))

    return apply


def unpack_integers(tensors: Tensors, *, group: Mapping[str, Any]) -> Stored:
    """INT8 or packed INT4 and INT8 of compressed-tensors."""
    scale = tensors["weight_scale"].float()
    if "weight_packed" in tensors:
        _rows, columns = tensors["weight_shape"].tolist()
        values = _unpacked(tensors["weight_packed"], group["weights"]["num_bits"])[:, :columns]
    else:
        values = tensors["weight"].float()
    weight = (values.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    tokens = rounding.int8_tokens if group.get("input_activations") else None
    return Stored(weight=weight, rounding=tokens)


def _unpacked(words: Any, num_bits: int) -> Any:
    """Return the signed integers in rows of 32-bit words, the lowest bits first."""
    import torch  # noqa: PLC0415  optional

    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
    values = (words[..., None] >> shifts) & (2**num_bits - 1)
    return values.flatten(1).float() - 2 ** (num_bits - 1)
