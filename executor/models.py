"""Loads a local model folder through transformers, with errors in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cost_models.errors import ConfigError, MeasurementError, ProfileError

INSTALL = "pip install 'trtllm-planner[quantization]'"


def pick_device(asked: str) -> str:
    """Return `cuda` or `cpu`.

    Raises:
        ConfigError: No such device here.
    """
    torch = _imported("torch")
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked not in ("cpu", "cuda"):
        raise ConfigError(f"--device {asked} is unknown", hint="known: auto, cpu, cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise MeasurementError("--device cuda: torch sees no GPU", hint="take --device cpu")
    return asked


def load_tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer.

    Raises:
        ProfileError: It has none that can be read.
    """
    transformers = _imported("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"{folder}: no tokenizer ({_one_line(error)})") from error


def load_model(folder: Path, device: str) -> Any:
    """Return the folder's model in the precision that it is stored in, ready to be asked.

    Raises:
        ProfileError: The folder holds no model that transformers reads.
    """
    auto = _imported("transformers").AutoModelForCausalLM
    return _loaded(auto, folder, device, source=folder)


def build_model(folder: Path, device: str, config: Any, state_dict: Mapping[str, Any]) -> Any:
    """Return a model of the folder's architecture with other weights than it holds.

    Raises:
        ProfileError: transformers does not know the architecture, or the weights are not its own.
    """
    transformers = _imported("transformers")
    name = (config.architectures or ["none"])[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise ProfileError(f"{folder}: architecture {name} is unknown to transformers")
    return _loaded(architecture, folder, device, config=config, state_dict=state_dict)


def _loaded(
    architecture: Any, folder: Path, device: str, *, source: Path | None = None, **weights: Any
) -> Any:
    try:
        model = architecture.from_pretrained(source, dtype="auto", local_files_only=True, **weights)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ProfileError(f"{folder}: no model for transformers ({_one_line(error)})") from error
    return model.to(device).eval()


def _imported(name: str) -> Any:
    """Import an optional package.

    Raises:
        MeasurementError: It is not installed.
    """
    import importlib  # noqa: PLC0415

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MeasurementError(f"{error.name or name} is not installed", hint=INSTALL) from error


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
