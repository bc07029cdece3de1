"""The reader of GPU and model profiles: the only place where the core touches files.

Edges are strict pydantic models that become dataclasses at once, so that nothing behind
this module has to check a profile again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cost_models.errors import ConfigError, PlannerError, ProfileError
from cost_models.gpu import GpuSpec
from cost_models.hf_config import model_from_config
from cost_models.model import ModelSpec

MODEL_SUFFIXES = (
    "-instruct", "-base", "-chat", "-hf", "-it", "-fp8", "-fp4", "-nvfp4", "-awq", "-gptq",
    "-instruct-2507", "-bf16", "-dynamic",
)  # fmt: skip
"""Endings of a hub name that do not change a model's shape."""


def list_gpus() -> list[str]:
    """Return the names of the shipped GPUs."""
    return sorted(path.stem for path in _folder("gpus").glob("*.yaml"))


def list_models() -> list[str]:
    """Return the names of the shipped models."""
    return sorted(path.stem for path in _folder("models").glob("*.json"))


def load_gpu(name_or_path: str) -> GpuSpec:
    """Return a GPU by profile name, alias or path of a YAML file.

    Raises:
        ProfileError: Unknown, or the file is not a GPU profile.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return _read_gpu(path)
    key = name_or_path.lower().replace(" ", "_")
    aliases = _gpu_aliases()
    if key not in aliases:
        raise ProfileError(
            f"GPU {name_or_path!r} is unknown", hint=_suggestion(key, list(aliases), list_gpus())
        )
    return _read_gpu(_folder("gpus") / f"{aliases[key]}.yaml")


def load_model(name_or_path: str) -> ModelSpec:
    """Return a model by profile name, hub name, `config.json` or model folder.

    Names match without organisation and case, and without endings such as -Instruct
    or -FP8. Any other hub name is looked up through transformers where it is installed.

    Raises:
        ProfileError: Unknown, or the file is not a model's config.
        UnsupportedModelError: The architecture is not understood.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        config = read_json_object(path)
        return _read_model(config, path)
    names = _model_names()
    for candidate in _name_candidates(name_or_path):
        if candidate in names:
            shipped = _folder("models") / f"{names[candidate]}.json"
            return _read_model(read_json_object(shipped), shipped)
    if "/" in name_or_path:
        return _hub_model(name_or_path)
    key = _name_candidates(name_or_path)[-1]
    raise ProfileError(
        f"model {name_or_path!r} is unknown",
        hint=_suggestion(key, list(names), list_models()) + ", or give a path to config.json",
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ProfileError: Missing, not text, not JSON, not an object, or with NaN in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not JSON ({_one_line(error)})") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: holds no JSON object")
    return data


def read_yaml_object(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ProfileError: Missing, not text, not YAML or not a mapping.
    """
    import yaml  # noqa: PLC0415  not needed to show help

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506  safe loader
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ProfileError(f"{path}: not YAML ({_one_line(error)})") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: holds no YAML mapping")
    return data


def first_problem(error: Any, path: Path) -> ProfileError:
    """Return pydantic's first complaint as one line that names file, key and value."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "file"
    if problem["type"] in ("extra_forbidden", "missing"):
        text = "is not a known key" if problem["type"] == "extra_forbidden" else "is missing"
        return ProfileError(f"{path}: {key} {text}")
    if problem["type"] == "union_tag_not_found":
        lacks = f"{path}: {key} lacks its {problem['ctx']['discriminator']}"
        return ProfileError(lacks, hint="write a number, or name the kind")
    value = str(problem.get("input"))[:60]
    return ProfileError(f"{path}: {key}={value!r}: {problem['msg'].lower()}")


def _read_gpu(path: Path) -> GpuSpec:
    from pydantic import ValidationError  # noqa: PLC0415  not needed to show help

    from cost_models.profile_schema import GpuProfile  # noqa: PLC0415

    data = read_yaml_object(path)
    try:
        return GpuProfile.model_validate(data).spec()
    except ValidationError as error:
        raise first_problem(error, path) from None


def _read_model(data: Mapping[str, Any], path: Path) -> ModelSpec:
    """A shipped wrapper, or a bare Hugging Face config."""
    config = data.get("config", data)
    if not isinstance(config, Mapping):
        raise ProfileError(f"{path}: config is not an object")
    folder = path.parent.name if path.name == "config.json" else path.stem
    name = str(data.get("name") or folder)
    hub_name = str(data.get("hub_name") or config.get("_name_or_path") or name)
    try:
        return model_from_config(config, name=name, hub_name=hub_name)
    except PlannerError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise ConfigError(f"{path}: not a model config ({_one_line(error)})") from None


def _hub_model(hub_name: str) -> ModelSpec:
    try:
        from transformers import AutoConfig  # noqa: PLC0415  optional
    except ImportError:
        raise ProfileError(
            f"model {hub_name!r} is not shipped",
            hint="give a path to its config.json, or `pip install transformers` to look it up",
        ) from None
    try:
        config = AutoConfig.from_pretrained(hub_name).to_dict()
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"model {hub_name!r} cannot be looked up ({_one_line(error)})",
            hint="give a path to its config.json",
        ) from None
    name = hub_name.rsplit("/", maxsplit=1)[-1].lower()
    return model_from_config(config, name=name, hub_name=hub_name)


def _folder(kind: str) -> Path:
    return Path(str(files("profiles"))) / kind


@cache
def _gpu_aliases() -> dict[str, str]:
    aliases: dict[str, str] = {}
    for name in list_gpus():
        data = read_yaml_object(_folder("gpus") / f"{name}.yaml")
        aliases |= {str(alias).lower(): name for alias in (name, *data["aliases"])}
    return aliases


@cache
def _model_names() -> dict[str, str]:
    names: dict[str, str] = {}
    for name in list_models():
        text = (_folder("models") / f"{name}.json").read_text(encoding="utf-8")
        data = json.loads(text)
        known = (name, data["hub_name"], *data["aliases"])
        names |= {alias.split("/")[-1].lower(): name for alias in known}
    return names


def _name_candidates(name: str) -> list[str]:
    """Return the bare name, then the name with its endings taken off one by one."""
    bare = name.rsplit("/", maxsplit=1)[-1].lower().replace("_", "-")
    candidates = [bare]
    while stripped := next((bare.removesuffix(s) for s in MODEL_SUFFIXES if bare.endswith(s)), ""):
        bare = stripped
        candidates.append(bare)
    return candidates


def _suggestion(key: str, names: list[str], shown: list[str]) -> str:
    close = get_close_matches(key, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(shown)}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:160]
