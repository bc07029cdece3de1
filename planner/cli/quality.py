"""`planner quantize` and `planner quality`: thin over `executor`. stdout is data."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cost_models.units import GIB, MIB
from planner.cli.options import JSON_OPTION, at_least, print_json
from planner.text.lines import folded

if TYPE_CHECKING:
    from executor.quality.judge import QualityReport
    from executor.quantization.schemes import Scheme

WIDTH = 80
"""Columns of what is printed."""

DEVICE_OPTION = click.option(
    "--device", default="auto", show_default=True, help="cuda, cpu, or auto."
)


@click.command("quantize")
@click.option("--model", default="", metavar="DIR", help="Folder of the BF16 checkpoint.")
@click.option("--scheme", default="", help="What the weights become; --list shows them.")
@click.option(
    "--kv-cache-dtype",
    default="bf16",
    show_default=True,
    help="bf16, fp8 or nvfp4: whose scales the checkpoint carries.",
)
@click.option(
    "--calibration-data",
    default="",
    metavar="FILE",
    help='Text, one document a line, or JSONL of {"text": ...}.',
)
@click.option("--out", default="", metavar="DIR", help="Folder to make.")
@click.option("--samples", default=256, show_default=True, help="Calibration sequences at most.")
@click.option("--max-tokens", default=512, show_default=True, help="Tokens of each.")
@DEVICE_OPTION
@click.option("--list", "lists", is_flag=True, help="Show schemes, engines and GPUs, and stop.")
@JSON_OPTION
def quantize_command(lists: bool, as_json: bool, **options: Any) -> int:
    """Quantize a checkpoint into a form that engines load."""
    if lists:
        _print_schemes(as_json)
        return 0
    for name in ("model", "scheme", "calibration_data", "out"):
        if not options[name]:
            raise click.UsageError(f"give --{name.replace('_', '-')}")
    from executor.quantization.calibration import CalibrationSize  # noqa: PLC0415  help is fast
    from executor.quantization.quantize import QuantizeRequest, quantize  # noqa: PLC0415

    made = quantize(
        QuantizeRequest(
            model=Path(options["model"]),
            scheme=options["scheme"],
            calibration_data=Path(options["calibration_data"]),
            out=Path(options["out"]),
            kv_cache_dtype=options["kv_cache_dtype"],
            size=CalibrationSize(
                num_samples=at_least(options["samples"], 1, "--samples"),
                max_tokens=at_least(options["max_tokens"], 16, "--max-tokens"),
            ),
            device=options["device"],
        )
    )
    if as_json:
        print_json(made.to_json())
        return 0
    click.echo(
        folded(
            f"{made.folder}: {made.scheme.name}, KV cache {made.kv_cache_dtype}, "
            f"{_size(made.bytes_before)} -> {_size(made.bytes_after)}, "
            f"calibrated on {made.calibration_tokens:,} tokens in {made.wall_s:.0f} s",
            WIDTH,
        )
    )
    click.echo(f"loaded by {', '.join(made.scheme.loaded_by)}")
    return 0


@click.command("quality")
@click.option("--model", required=True, metavar="DIR", help="Folder that is judged.")
@click.option("--against", required=True, metavar="DIR", help="Folder of the unquantized model.")
@click.option(
    "--data", required=True, metavar="FILE", help="Held-out text, as --calibration-data takes it."
)
@click.option(
    "--kv-cache-dtype",
    default="auto",
    show_default=True,
    help="bf16, fp8, int8 or nvfp4 in place of what the checkpoint asks for.",
)
@click.option("--documents", default=200, show_default=True, help="Documents at most.")
@click.option("--max-tokens", default=1024, show_default=True, help="Tokens of a document.")
@click.option(
    "--new-tokens", default=64, show_default=True, help="Tokens of a generation; 0: none is made."
)
@click.option("--generations", default=64, show_default=True, help="Documents continued.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same intervals.")
@DEVICE_OPTION
@click.option(
    "--install",
    default="",
    metavar="NAME",
    help="Let plans of this model take what was measured: its name, config.json or folder.",
)
@JSON_OPTION
def quality_command(as_json: bool, install: str, **options: Any) -> int:
    """Judge a quantized checkpoint beside the model that it was made from."""
    from cost_models.profile_io import load_model  # noqa: PLC0415  help is fast
    from executor.quality.judge import QualityRequest, judge  # noqa: PLC0415

    model = load_model(install) if install else None
    report = judge(
        QualityRequest(
            model=Path(options["model"]),
            against=Path(options["against"]),
            data=Path(options["data"]),
            kv_cache_dtype=options["kv_cache_dtype"],
            max_documents=at_least(options["documents"], 2, "--documents"),
            max_tokens=at_least(options["max_tokens"], 2, "--max-tokens"),
            new_tokens=at_least(options["new_tokens"], 0, "--new-tokens"),
            generations=at_least(options["generations"], 0, "--generations"),
            seed=options["seed"],
            device=options["device"],
        )
    )
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report)
    if model is not None:
        from planner.quality.files import install as put_in_force  # noqa: PLC0415

        path = put_in_force(report.to_json(), model)
        click.echo(f"In force for plans of {model.name}: {path}", err=True)
    return 0


def _size(num_bytes: float) -> str:
    """Return a checkpoint's size in the unit in which it shows."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.2f} MiB"


def _print_report(report: QualityReport) -> None:
    click.echo(
        folded(
            f"{report.model} ({report.quantization}, KV cache {report.kv_cache_dtype}) against "
            f"{report.against}: {report.num_documents} documents, {report.num_tokens:,} tokens, "
            f"{report.num_generations} generations, {report.wall_s:.0f} s",
            WIDTH,
        )
    )
    for name, one in report.estimates.items():
        click.echo(f"  {name:22}{one.value:12.5g}  ({one.low:.5g} to {one.high:.5g})")


def _print_schemes(as_json: bool) -> None:
    from engines.registry import list_engines  # noqa: PLC0415  help is fast
    from executor.quantization.schemes import SCHEMES  # noqa: PLC0415

    if as_json:
        rows = {
            name: {
                "quantization": row.quantization,
                "form": str(row.form),
                "loaded_by": dict(row.loaded_by),
                "sm": {engine: row.compute_capabilities(engine) for engine in list_engines()},
            }
            for name, row in SCHEMES.items()
        }
        print_json({"schemes": rows})
        return
    for name, row in SCHEMES.items():
        click.echo(f"{name}: {row.quantization} in the form {row.form}")
        for engine in (*list_engines(), "transformers"):
            click.echo(_loading_line(row, engine))


def _loading_line(row: Scheme, engine: str) -> str:
    """Say on which GPUs an engine loads a scheme and where that stands, or why it does not."""
    sm = ", ".join(map(str, row.compute_capabilities(engine)))
    source = row.loaded_by.get(engine)
    if source is None:
        said = f"no: {row.why_not(engine)}"
    else:
        said = f"sm {sm}; {source}" if sm else source
    return textwrap.fill(
        said,
        WIDTH,
        initial_indent=f"  {engine:14}",
        subsequent_indent=" " * 16,
        break_on_hyphens=False,
    )
