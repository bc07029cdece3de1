"""The user's own calibrations: kept in the configuration folder and laid over the shipped ones.

`<folder>/<engine>.json` holds an engine's constants, `<folder>/gpus/<gpu>-<engine>.json` those
fitted on the machines of one GPU, which the constants of a host belong to, and
`<folder>/gpus/<gpu>.json` the operators of a GPU. All are in force wherever no other calibration is
named, what is nearer to the GPU over what is farther.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from planner.files import config_folder

SHIPPED = "shipped"
"""Names the shipped calibration where the user has one of their own."""


def own_folder() -> Path:
    """Return the folder of the user's calibrations."""
    return config_folder() / "calibrations"


def own_operators(gpu: str, folder: Path | None = None) -> tuple[str, ...]:
    """Return the user's file of a GPU's operators, if there is one.

    Args:
        gpu: Profile name.
        folder: Other than `own_folder`.
    """
    path = (folder or own_folder()) / "gpus" / f"{gpu}.json"
    return (str(path),) if path.is_file() else ()


def own_constants(engine: str, gpu: str, folder: Path | None = None) -> tuple[str, ...]:
    """Return the user's files of an engine's constants: of all GPUs, then of this one.

    Args:
        engine: `trtllm` or `vllm`.
        gpu: Profile name.
        folder: Other than `own_folder`.
    """
    names = (engine, constants_name(engine, [gpu]))
    paths = [(folder or own_folder()) / f"{name}.json" for name in names]
    return tuple(str(path) for path in paths if path.is_file())


def constants_name(engine: str, gpus: Collection[str]) -> str:
    """Return the name under which constants fitted on these GPUs' machines are put in force."""
    return f"gpus/{next(iter(gpus))}-{engine}" if len(gpus) == 1 else engine


def files_in_force(asked: str, *, gpu: str, engine: str) -> tuple[str, ...]:
    """Return the files that are laid over what is shipped, in order.

    Args:
        asked: A file instead of the user's own constants; `shipped` for nothing of the user's.
        gpu: Profile name.
        engine: `trtllm` or `vllm`.
    """
    if asked == SHIPPED:
        return ()
    return own_operators(gpu) + ((asked,) if asked else own_constants(engine, gpu))


def put_in_force(candidate: Path, *, name: str, folder: Path | None = None) -> Path:
    """Move a calibration file into the user's folder, whole or not at all.

    Args:
        candidate: The file; gone afterwards.
        name: `constants_name` of constants, or `gpus/<gpu>` for operators.
        folder: Other than `own_folder`.
    """
    from planner.files import write_text  # noqa: PLC0415  first paint of the interface

    path = (folder or own_folder()) / f"{name}.json"
    write_text(path, candidate.read_text(encoding="utf-8"))
    candidate.unlink()
    return path


def set_aside(folder: Path | None = None) -> list[Path]:
    """Rename the user's calibrations to `*.json.old`, so that the shipped ones are in force."""
    aside = []
    for path in sorted((folder or own_folder()).rglob("*.json")):
        aside.append(path.replace(path.with_suffix(".json.old")))
    return aside
