"""A note in each folder that `planner quantize` makes: which scheme it holds.

The formats themselves do not tell GPTQ from plain rounding, nor name a scheme as plans do.
"""

from __future__ import annotations

import json
from pathlib import Path

from cost_models.profile_io import read_json_object
from executor.quantization.schemes import Scheme

FILE = "planner_quantization.json"


def mark(folder: Path, row: Scheme, kv_cache_dtype: str) -> None:
    """Write which scheme the folder holds."""
    note = {
        "scheme": row.name,
        "quantization": row.quantization,
        "kv_cache_dtype": kv_cache_dtype,
    }
    (folder / FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def made_by_planner(folder: Path) -> str:
    """Return the quantization that a folder holds, as plans call it; empty where unknown."""
    path = folder / FILE
    return str(read_json_object(path).get("quantization", "")) if path.exists() else ""
