"""What a person reads: plans, predictions and errors as tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cost_models.deployment import Deployment
from cost_models.units import GIB
from planner.prediction.predict import Prediction
from planner.prediction.simulation import SimulationSummary
from planner.text.lines import (
    FRONT_TITLE,
    LATENCIES,
    RATES,
    SCHEDULING_TITLE,
    folded,
    front_lines,
    fusion_lines,
    limit_lines,
    loss_words,
    scheduling_lines,
    speculation_words,
)

if TYPE_CHECKING:
    from planner.calibration.diff import CalibrationDiff
    from planner.plans.plan import Neighbour, Plan
    from planner.plans.scheduling import Scheduling
    from planner.search.study import Candidate
    from planner.validation.operators import OperatorError
    from planner.validation.validate import MetricError, Validation

PIPED_WIDTH = 80
"""Columns of a report that does not go to a terminal."""

SHORT_FAMILIES: Mapping[str, str] = {
    "attention_decode": "attn dec",
    "attention_prefill": "attn pre",
    "elementwise": "elem",
    "communication": "comm",
}
"""Operator families whose names are too long for a column."""

MANY_FAMILIES = 9
"""Columns of a step's time above which they stand closer."""


def print_plan(plan: Plan, *, gpu: str, workload: str, engine: str) -> None:
    """Print a plan: recommendation, prediction, memory, reasons, alternatives."""
    console = _console()
    best = plan.recommended
    if plan.status == "feasible":
        _say(console, f"Recommended for {workload} on {gpu} (objective: {plan.objective})")
    else:
        _say(console, f"No configuration for {workload} on {gpu} meets every limit; the nearest:")
    console.print()
    _print_config(console, best.deployment, engine=engine)
    _print_prediction_body(console, best)
    if plan.risk:
        held = 100 * (1 - plan.risk)
        console.print(f"  SLO checked at the upper end of the interval of {held:.0f} %")
    for relaxation in plan.relaxations:
        console.print(
            f"  to be feasible: {relaxation.limit} from {relaxation.given:.4g} "
            f"to {relaxation.needed:.4g}"
        )
    _print_growth(console, plan)
    _print_neighbours(console, plan.neighbours)
    _print_scheduling(console, plan.scheduling)
    if plan.alternatives:
        console.print("\nBest rejected candidates")
        for alternative in plan.alternatives:
            _say(
                console,
                f"  {_short(alternative.prediction.deployment)}: {alternative.rejected_because}",
            )
    if plan.search.pareto:
        _print_front(console, plan.search.pareto)
    console.print()
    _say(
        console,
        f"{plan.search.num_evaluated} configurations evaluated in {plan.search.wall_s:.2f} s, "
        f"{len(plan.search.pareto)} on the Pareto front (--json lists them), "
        f"seed {plan.search.seed}",
    )


def print_prediction(
    prediction: Prediction, *, engine: str, notes: Mapping[str, Any] | None = None
) -> None:
    """Print what one configuration would do, and what the command found beside."""
    console = _console()
    _print_config(console, prediction.deployment, engine=engine)
    _print_prediction_body(console, prediction)
    notes = notes or {}
    if "found_rate_per_s" in notes:
        console.print(
            f"  highest rate that meets the SLO: {notes['found_rate_per_s']:.4g} requests/s"
        )
    for violation in notes.get("not_deployable", ()):
        _say(console, f"  not deployable: {violation}")
    if notes.get("ignored_options"):
        ignored = ", ".join(notes["ignored_options"])
        _say(console, f"  without effect on the prediction: {ignored}")


def print_validation(result: Validation) -> None:
    """Print the error by GPU, engine, model and metric."""
    console = _console()
    for group in result.groups:
        console.print(f"{group.gpu} {group.engine} {group.model} ({group.n} runs)")
        _print_errors(console, group.metrics)
    if len(result.loads) > 1:
        for kind, count, errors in result.loads:
            console.print(f"\n{kind.replace('_', ' ')} ({count} runs)")
            _print_errors(console, errors)
    limited = len(result.rows) - len(result.without_front_end_limited().rows)
    if limited:
        console.print(f"\nWithout the {limited} runs that the front end limits, not the GPU")
        for group in result.without_front_end_limited().groups:
            console.print(f"{group.gpu} {group.engine} {group.model} ({group.n} runs)")
            _print_errors(console, group.metrics)
    for run_id, reason in result.skipped:
        console.print(f"skipped {run_id}: {reason}")


def print_operator_errors(errors: Iterable[OperatorError]) -> None:
    """Print the error of each operator family."""
    table = _table("system", "family", "dtype", "n", "MAPE %", "median %", "bias %")
    for e in errors:
        table.add_row(
            e.system, e.family, e.dtype, str(e.n),
            f"{e.mape_pct:.2f}", f"{e.median_ape_pct:.2f}", f"{e.bias_pct:+.2f}",
        )  # fmt: skip
    _console().print(table)


def print_profiles() -> None:
    """Print every shipped GPU, model, workload and engine."""
    from cost_models.calibration_io import calibrated_gpus  # noqa: PLC0415
    from cost_models.profile_io import list_gpus, list_models, load_gpu  # noqa: PLC0415
    from engines.registry import list_engines  # noqa: PLC0415
    from planner.workloads.workload import list_workloads  # noqa: PLC0415

    console, fitted = _console(), calibrated_gpus()
    table = _table("GPU", "memory GiB", "HBM TB/s", "BF16 TFLOP/s", "USD/h", "operators")
    for name in list_gpus():
        gpu = load_gpu(name)
        table.add_row(
            name,
            f"{gpu.memory_bytes / GIB:.1f}",
            f"{gpu.hbm_bytes_per_s / 1e12:.2f}",
            f"{gpu.peak_flop_per_s('bf16') / 1e12:.0f}",
            f"{gpu.usd_per_hour:.2f}",
            "calibrated" if name in fitted else "datasheet",
        )
    console.print(table)
    console.print(f"models: {', '.join(list_models())}")
    console.print(f"workloads: {', '.join(list_workloads())}")
    console.print(f"engines: {', '.join(list_engines())}")


def _print_config(console: Console, deployment: Deployment, *, engine: str) -> None:
    from engines.registry import find_engine  # noqa: PLC0415

    config = deployment.config
    fraction = find_engine(engine).traits.memory_knob
    pairs = (
        ("quantization", config.quantization, "kv_cache_dtype", config.kv_cache_dtype),
        (
            "tensor_parallel_size",
            config.tensor_parallel_size,
            "pipeline_parallel_size",
            config.pipeline_parallel_size,
        ),
        (
            "moe_expert_parallel_size",
            config.moe_expert_parallel_size,
            "enable_attention_dp",
            config.enable_attention_dp,
        ),
        ("servers", deployment.num_servers, "moe_config.backend", config.moe_backend),
        ("max_batch_size", config.max_batch_size, "max_num_tokens", config.max_num_tokens),
        ("max_seq_len", config.max_seq_len, "tokens_per_block", config.tokens_per_block),
        (
            "enable_chunked_prefill",
            config.enable_chunked_prefill,
            "enable_block_reuse",
            config.enable_block_reuse,
        ),
        (
            fraction,
            f"{getattr(config, fraction):g}",
            "stream_interval",
            config.stream_interval,
        ),
    )
    for name, value, other, beside in pairs:
        console.print(f"  {name:25} {value!s:11}  {other:22} {beside}")
    for name, value in (
        ("cuda_graph max_batch_size", config.cuda_graph_max_batch_size),
        ("capacity_scheduler_policy", config.capacity_scheduler_policy),
    ):
        console.print(f"  {name} {value}")
    if deployment.num_servers > 1:
        console.print(
            f"  {deployment.num_servers} servers on {deployment.num_gpus} GPUs, "
            f"router {deployment.router}"
        )
    if config.speculates:
        for name in ("decoding_type", "max_draft_len", "speculative_model"):
            if value := getattr(config, name):
                console.print(f"  {name:25} {value}")


def _print_prediction_body(console: Console, prediction: Prediction) -> None:
    _print_latencies(console, prediction)
    _print_rates(console, prediction)
    _print_quality(console, prediction)
    _print_simulation(console, prediction)
    _print_speculation(console, prediction)
    _print_memory(console, prediction)
    _print_steps(console, prediction)
    console.print()
    _say(console, f"Binding limit: {prediction.binding_limit}")
    _say_all(console, limit_lines(prediction))


def _print_speculation(console: Console, prediction: Prediction) -> None:
    if prediction.speculation is not None:
        _say(console, f"  {speculation_words(prediction.speculation)}")


def _print_latencies(console: Console, prediction: Prediction) -> None:
    table = _table("ms", "mean", "P50", "P90", "P95", "P99", "90 % interval of the mean")
    for title, name in LATENCIES:
        cells = [
            f"{prediction.value(f'{name}.{s}'):.1f}" for s in ("mean", "p50", "p90", "p95", "p99")
        ]
        low, high = prediction.metrics[f"{name}.mean"].interval_90
        table.add_row(title, *cells, f"{low:.1f} to {high:.1f}")
    console.print(table)


def _print_rates(console: Console, prediction: Prediction) -> None:
    for title, name, unit in RATES:
        metric = prediction.metrics[name]
        low, high = metric.interval_90
        console.print(
            f"  {title:9}{metric.value:>10.4g} {unit} "
            f"({low:.4g} to {high:.4g}, {metric.provenance})"
        )
    if prediction.highest_rate_per_s > 0:
        num_servers = prediction.deployment.num_servers
        whole = f" of all {num_servers} servers" if num_servers > 1 else ""
        console.print(
            f"  {'Headroom':9}{prediction.highest_rate_per_s:>10.4g} requests/s is the highest "
            f"rate under the SLO{whole}"
        )


def _print_quality(console: Console, prediction: Prediction) -> None:
    """Print the expected loss with its interval and where it is from, if there is any."""
    quality = prediction.quality
    console.print(f"  {'Quality':9}{'':6}{loss_words(quality)}")
    for source in quality.sources:
        _say(console, f"{'':12}{source.split(':')[0]}")


def _print_front(console: Console, front: Sequence[Candidate]) -> None:
    console.print(f"\n{FRONT_TITLE}")
    _say_all(console, front_lines(front))


def _print_simulation(console: Console, prediction: Prediction) -> None:
    if prediction.simulation is None:
        console.print("  Latencies and rates are in closed form: nothing was simulated")
        return
    run = SimulationSummary.of(prediction.simulation)
    _say(
        console,
        f"  Simulated {run.num_requests:,} requests in {run.num_steps:,} steps: "
        f"KV cache {100 * run.kv_mean_fraction:.0f} % used on average, "
        f"{100 * run.kv_max_fraction:.0f} % at most, {run.num_preemptions} preemptions",
    )
    for refused in prediction.refusals:
        _say(console, f"  REFUSED: {refused}")


def _print_memory(console: Console, prediction: Prediction) -> None:
    memory = prediction.memory
    total = float(memory.total_bytes)
    parts = (
        ("weights", memory.weight_bytes_per_gpu),
        ("KV cache", memory.kv_cache_bytes_per_gpu),
        ("activations", memory.activation_bytes_per_gpu),
        ("runtime", memory.runtime_bytes_per_gpu),
        ("communication", memory.communication_bytes_per_gpu),
        ("CUDA graphs", memory.cuda_graph_bytes_per_gpu),
        ("free", memory.free_bytes_per_gpu),
    )
    console.print(f"\nMemory of one GPU ({total / GIB:.1f} GiB)")
    for name, size in parts:
        share = float(size) / total
        bar = "#" * max(round(40 * share), 0)
        console.print(f"  {name:14}{float(size) / GIB:8.2f} GiB {100 * share:5.1f} %  {bar}")
    console.print(
        f"  KV cache: {float(memory.kv_cache_blocks):.0f} blocks, "
        f"{float(memory.kv_cache_tokens):.0f} tokens, "
        f"{float(memory.max_sequences):.0f} sequences of max_seq_len"
    )
    if not prediction.fits:
        short = float(memory.shortfall_bytes)
        console.print(f"  DOES NOT FIT: {short:.0f} bytes short ({memory.binding})")


def _print_steps(console: Console, prediction: Prediction) -> None:
    families = prediction.step_time_breakdown["decode"]
    titles = [SHORT_FAMILIES.get(name, name) for name in families]
    table = _table("ms/step", *titles, gap=2 if len(titles) <= MANY_FAMILIES else 1)
    for step, seconds in prediction.step_time_breakdown.items():
        table.add_row(step, *(f"{1e3 * value:.2f}" for value in seconds.values()))
    console.print(table)
    _say_all(console, fusion_lines(prediction.fusion_savings))


def _print_neighbours(console: Console, neighbours: Iterable[Neighbour]) -> None:
    console.print("\nWhat changing one knob would do")
    for neighbour in neighbours:
        _say(console, f"  {neighbour.knob}={neighbour.value}: {neighbour.verdict}")


def _print_growth(console: Console, plan: Plan) -> None:
    """Print what further GPUs would buy, where there are any."""
    at_hand, taken = plan.num_gpus, plan.recommended.deployment.num_gpus
    if plan.status != "feasible" or at_hand <= taken:
        return
    console.print(f"\nThis takes {taken} of {at_hand} GPUs; --use-all spends them. More would buy")
    if not plan.growth:
        console.print("  nothing")
        return
    table = _table("GPUs", "deployment", "highest rate /s", "TTFT P99", "TPOT", "USD/M tokens")
    for step in plan.growth:
        table.add_row(
            str(step.deployment.num_gpus),
            _split(step.deployment),
            f"{step.highest_rate_per_s:.4g}",
            f"{step.ttft_p99_ms:.1f} ms",
            f"{step.tpot_mean_ms:.2f} ms",
            f"{step.usd_per_million_output_tokens:.3g}",
        )
    console.print(table)


def _print_scheduling(console: Console, found: Scheduling) -> None:
    console.print(f"\n{SCHEDULING_TITLE}")
    _say_all(console, scheduling_lines(found))


def print_calibration_diff(found: CalibrationDiff) -> None:
    """Print the numbers in which two calibrations differ."""
    console = _console()
    parts = (
        ("constant", found.constants),
        ("90 % interval, width in %", found.intervals),
        ("prediction of the plan", found.metrics),
    )
    for title, changes in parts:
        if not changes:
            continue
        table = _table(title, "before", "after", "change")
        for change in changes:
            percent = f"{100 * (change.ratio - 1):+.1f} %" if change.before else "new"
            table.add_row(change.name, f"{change.before:.4g}", f"{change.after:.4g}", percent)
        console.print(table)
        console.print()
    if found.operators:
        console.print(f"Operators fitted anew: {', '.join(found.operators)}")
    if not any((found.constants, found.intervals, found.operators)):
        console.print("No difference: planner calibrate --install puts one of your own in force.")


def _print_errors(console: Console, metrics: Mapping[str, MetricError]) -> None:
    table = _table("metric", "n", "MAPE %", "median %", "bias %", "in 90 %", "width %")
    for name, e in metrics.items():
        table.add_row(
            name, str(e.n), f"{e.mape_pct:.1f}", f"{e.median_ape_pct:.1f}", f"{e.bias_pct:+.1f}",
            f"{e.coverage_90_pct:.0f}", f"{e.interval_90_rel_width_pct:.0f}",
        )  # fmt: skip
    console.print(table)


def _short(deployment: Deployment) -> str:
    config = deployment.config
    limits = f"batch {config.max_batch_size} tokens {config.max_num_tokens}"
    return f"{_split(deployment)} {limits}"


def _split(deployment: Deployment) -> str:
    """Return how a deployment stores and splits the model, and in how many servers."""
    config = deployment.config
    parts = [config.quantization, f"kv {config.kv_cache_dtype}", f"TP{config.tensor_parallel_size}"]
    if config.pipeline_parallel_size > 1:
        parts.append(f"PP{config.pipeline_parallel_size}")
    if config.moe_expert_parallel_size > 1:
        parts.append(f"EP{config.moe_expert_parallel_size}")
    if config.enable_attention_dp:
        parts.append("attention DP")
    servers = [f"{deployment.num_servers} x"] if deployment.num_servers > 1 else []
    return " ".join([*servers, *parts])


def _say(console: Console, text: str) -> None:
    console.print(folded(text, console.width))


def _say_all(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        _say(console, f"  {line}")


def _table(*columns: str, gap: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return (
        console
        if console.is_terminal
        else Console(highlight=False, width=PIPED_WIDTH, soft_wrap=True)
    )
