"""Commands that measure: thin over `planner.measuring.measure`. stdout is data, stderr is talk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from cost_models.errors import MeasurementError
from planner.cli.options import (
    JSON_OPTION,
    STORE_OPTION,
    duration_s,
    measuring_options,
    print_json,
)

if TYPE_CHECKING:
    from executor.case import Measurement
    from executor.store import StoredRun


@click.command("measure")
@click.argument("plan", required=False)
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    help="Shipped name, JSON file, or a trace (CSV, JSONL); default: the plan's. Repeatable: "
    "several share each start of the engine.",
)
@click.option(
    "--model", default="", help="Model name, config.json or folder; overrides the workload's."
)
@click.option("--gpu", default="", help="GPU profile; default: the GPU of this machine.")
@click.option("--config", default="", metavar="FILE", help="The engine's YAML instead of a plan.")
@click.option(
    "--set", "settings", multiple=True, metavar="KNOB=VALUE", help="Change a knob; repeatable."
)
@click.option(
    "--top",
    default=1,
    show_default=True,
    metavar="K",
    help="Measure the plan's recommendation and the K - 1 alternatives that may still beat it.",
)
@click.option("--repeats", default=0, help="Runs of a configuration; default: until they agree.")
@click.option(
    "--time-budget",
    type=duration_s,
    metavar="TIME",
    default="10m",
    show_default=True,
    help="For everything together: 90s, 20m or 1h.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same lengths and tokens.")
@measuring_options
@JSON_OPTION
def measure_command(
    plan: str | None,
    settings: tuple[str, ...],
    backend_options: tuple[str, ...],
    time_budget: float,
    as_json: bool,
    **options: Any,
) -> int:
    """Run a plan, or a configuration, on real hardware and keep what was measured."""
    from planner.knobs import parse_assignments  # noqa: PLC0415
    from planner.measuring.measure import (  # noqa: PLC0415
        measure_request,
        measured_drift,
        measurement_to_json,
    )
    from planner.measuring.request import MeasureRequest  # noqa: PLC0415  help must not wait

    if plan and options["config"]:
        raise click.UsageError("give a plan or --config, not both")
    if not time_budget > 0:
        raise click.UsageError(f"--time-budget {time_budget}: it must be above 0")
    first, *more = options.pop("workloads") or ("",)
    request = MeasureRequest(
        workload=first,
        more_workloads=more,
        plan=plan or "",
        settings=parse_assignments(settings, "--set"),
        backend_options=parse_assignments(backend_options, "--option"),
        time_budget_s=time_budget,
        progress=None if as_json else _show_progress,
        **options,
    )
    results = measure_request(request)
    if as_json:
        print_json({"cases": [measurement_to_json(result) for result in results]})
    else:
        for result in results:
            _print_measurement(result)
        for line in measured_drift(results, store=options["store"]):
            click.echo(line)
    return 0 if all(result.is_ok for result in results) else MeasurementError.exit_status


@click.group("runs")
def runs_group() -> None:
    """List, show, compare and export measured runs."""


@runs_group.command("list")
@STORE_OPTION
@JSON_OPTION
def runs_list(store: str, as_json: bool) -> int:
    """List the runs of a store, oldest first."""
    from planner.measuring.measure import list_runs  # noqa: PLC0415

    runs = list_runs(store)
    if as_json:
        print_json({"runs": [dict(run.record) for run in runs]})
        return 0
    for run in runs:
        measured = run.record.get("measured") or {}
        rate = measured.get("output_tok_per_s")
        shown = f"{rate:10.1f} tok/s" if rate is not None else " " * 16
        flags = " ".join(run.record.get("flags") or ())
        click.echo(f"{run.run_id}  {run.status:16} {shown}  {flags}".rstrip())
    return 0


@runs_group.command("show")
@click.argument("run")
@STORE_OPTION
@JSON_OPTION
def runs_show(run: str, store: str, as_json: bool) -> int:
    """Show one run; the beginning of its id is enough."""
    from planner.measuring.measure import show_run  # noqa: PLC0415

    found = show_run(store, run)
    if as_json:
        print_json(dict(found.record))
    else:
        _print_run(found.record)
    return 0


@runs_group.command("export")
@click.argument("out")
@click.argument("run", nargs=-1)
@STORE_OPTION
def runs_export(out: str, run: tuple[str, ...], store: str) -> int:
    """Write runs (default: all good ones) and their requests to OUT, for `planner validate`."""
    from planner.measuring.measure import export_runs  # noqa: PLC0415

    click.echo(str(export_runs(store, out, run)))
    return 0


@runs_group.command("compare")
@click.argument("first")
@click.argument("second")
@STORE_OPTION
@JSON_OPTION
def runs_compare(first: str, second: str, store: str, as_json: bool) -> int:
    """Set two runs beside each other: metrics, and the knobs in which they differ."""
    from planner.measuring.measure import compare_runs, show_run  # noqa: PLC0415

    one, two = show_run(store, first), show_run(store, second)
    rows, knobs = compare_runs(one, two), _differences(one, two)
    if as_json:
        metrics = {name: {"first": a, "second": b} for name, a, b in rows}
        print_json({"first": one.run_id, "second": two.run_id, "metrics": metrics, **knobs})
        return 0
    click.echo(f"first   {one.run_id}\nsecond  {two.run_id}\n")
    for part, values in knobs.items():
        for name, (a, b) in values.items():
            click.echo(f"  {part}.{name}: {a} / {b}")
    for name, a, b in rows:
        change = f"{100 * (b / a - 1):+7.1f} %" if a else ""
        click.echo(f"{name:26} {a:14.3f} {b:14.3f} {change}")
    return 0


@click.command("doctor")
@JSON_OPTION
def doctor_command(as_json: bool) -> int:
    """Say what is installed, which backends can run here, and what is missing."""
    from executor.machine import NvmlReader, git_revision  # noqa: PLC0415
    from planner.measuring.measure import doctor  # noqa: PLC0415

    identity, states = NvmlReader().identity(), doctor()
    if as_json:
        backends = {
            state.name: {
                "can_run": state.availability.can_run,
                "version": state.availability.version,
                "problem": state.availability.problem,
                "install": state.availability.install,
            }
            for state in states
        }
        facts = {"python": sys.version.split()[0], "git_revision": git_revision()}
        print_json({**facts, "gpu": identity, "backends": backends})
        return 0
    click.echo(f"python {sys.version.split()[0]}")
    click.echo(f"GPU    {_gpu_line(identity)}")
    for state in states:
        here = state.availability
        found = f"ready {here.version}" if here.can_run else here.problem
        click.echo(f"{state.name:14} {found.rstrip()}")
        if here.install:
            click.echo(f"{'':14} {here.install}")
    return 0


@click.command("microbench")
@click.argument("out")
@click.option("--gpu", default="", help="GPU profile; default: the GPU of this machine.")
@click.option("--time-budget", default=300.0, show_default=True, help="Seconds for everything.")
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default=None, help="Default: a GPU if any."
)
@click.option(
    "--families", default="", metavar="A,B", help="Only these kernels; an unknown one lists all."
)
@click.option(
    "--techniques", is_flag=True, help="Time what optimizations are worth, not a calibration."
)
@JSON_OPTION
def microbench_command(
    out: str, time_budget: float, families: str, techniques: bool, as_json: bool, **options: Any
) -> int:
    """Time kernels on the local GPU and write their tables to the folder OUT."""
    from executor.microbench.run import CALIBRATION_FAMILIES  # noqa: PLC0415
    from executor.microbench.techniques import TECHNIQUES  # noqa: PLC0415
    from planner.measuring.measure import run_microbench  # noqa: PLC0415

    if not time_budget > 0:
        raise click.UsageError(f"--time-budget {time_budget}: it must be above 0")
    named = [name.strip() for name in families.split(",") if name.strip()]
    chosen = [*named, *(TECHNIQUES if techniques else ())]
    result, written = run_microbench(
        out=out,
        gpu=options["gpu"],
        time_budget_s=time_budget,
        device=options["device"] or "",
        families=tuple(dict.fromkeys(chosen)) or CALIBRATION_FAMILIES,
        progress=_show_progress if sys.stderr.isatty() and not as_json else None,
    )
    if as_json:
        failures = [{"point": point, "reason": reason} for point, reason in result.failures]
        print_json({"rows": [dict(row) for row in result.rows], "failures": failures})
        return 0
    click.echo(f"{len(result.rows)} of {result.num_points} points, {len(result.failures)} failed")
    for point, reason in result.failures:
        click.echo(f"  {point}: {reason}")
    for path in written:
        click.echo(str(path))
    return 0


COMMANDS: tuple[click.Command, ...] = (
    measure_command, runs_group, microbench_command, doctor_command,
)  # fmt: skip
"""What `planner` takes from here."""


def _show_progress(what: str, left_s: float) -> None:
    click.echo(f"{what}, {left_s:.0f} s left", err=True)


def _print_measurement(result: Measurement) -> None:
    for record in result.records[result.num_resumed :]:
        _print_run(record)
    if result.num_resumed:
        click.echo(f"{result.num_resumed} runs of this case were there before")
    from executor.repeats import repeats_section  # noqa: PLC0415

    section = repeats_section(result.measured)
    click.echo(f"{section.pop('num_repeats')} repeats")
    for name, repeat in section.items():
        low, high = repeat["interval"]
        far = f", outliers: repeats {repeat['outliers']}" if repeat["outliers"] else ""
        click.echo(
            f"  {name:18} median {repeat['median']:.3f} "
            f"({low:.3f} to {high:.3f}, {100 * repeat['coverage']:.0f} %){far}"
        )


def _print_run(record: Mapping[str, Any]) -> None:
    from planner.measuring.request import COMPARED_METRICS  # noqa: PLC0415
    from planner.workloads.measured import flat_metrics  # noqa: PLC0415

    click.echo(f"{record['run_id']}: {record['status']}")
    for name in ("notes", "error"):
        if record.get(name):
            click.echo(f"  {name}: {record[name]}")
    if record.get("flags"):
        click.echo(f"  flags: {', '.join(record['flags'])}")
    measured = flat_metrics(record.get("measured") or {})
    predicted = record.get("predicted") or {}
    for name in (name for name in COMPARED_METRICS if name in measured):
        said = predicted.get(name)
        beside = f"   predicted {said['value']:.3f}" if said else ""
        click.echo(f"  {name:26} {measured[name]:14.3f}{beside}")


def _differences(one: StoredRun, two: StoredRun) -> dict[str, dict[str, tuple[Any, Any]]]:
    found = {}
    for part in ("config", "workload"):
        a, b = one.record[part], two.record[part]
        names = sorted(set(a) | set(b))
        found[part] = {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)}
    return found


def _gpu_line(identity: Mapping[str, Any]) -> str:
    if not identity:
        return "none found: `transformers` runs on the CPU, `endpoint` measures other machines"
    name = identity.get("gpu_name", "of unknown name")
    driver = identity.get("driver_version", "unknown driver")
    return f"{name} x {identity['num_gpus_seen']}, {driver}"
