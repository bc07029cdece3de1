"""Fits one GPU's operators on measured tables."""

from __future__ import annotations

import json
from pathlib import Path

from cost_models.calibration_io import SCHEMA_VERSION, operators_to_json
from cost_models.fitting.operators import FAMILIES, fit_operators, has_table
from cost_models.profile_io import load_gpu
from planner.files import write_text


def calibrate_operators(folder: str, *, gpu: str, out: str) -> list[str]:
    """Fit one GPU's operators on the tables of a folder and write them.

    Raises:
        ProfileError: No table of that GPU.
    """
    spec = load_gpu(gpu)
    fitted = fit_operators(Path(folder), spec)
    versions = {fit.source.rsplit(" ", 1)[-1] for fit in fitted.get("gemm", {}).values()}
    content = {
        "schema_version": SCHEMA_VERSION,
        "gpu": spec.name,
        "engine": "trtllm",
        "engine_version": ", ".join(sorted(versions)),
        "source": f"operator tables in {Path(folder).name}",
        "operators": operators_to_json(fitted),
    }
    write_text(Path(out), json.dumps(content, separators=(",", ":")) + "\n")
    silent = [
        f"{spec.name} {family}: too few rows to fit, the shipped operators stay"
        for family in FAMILIES
        if not fitted.get(family) and has_table(Path(folder), family)
    ]
    return [
        f"{spec.name} {family} {dtype}: {fit.num_points} points, MAPE {fit.mape_pct:.2f} %, "
        f"left-out shapes {fit.holdout_mape_pct:.2f} %"
        for family, fits in fitted.items()
        for dtype, fit in fits.items()
    ] + silent
