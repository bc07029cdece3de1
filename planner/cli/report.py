"""What a person reads: plans, predictions and errors as tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cost_models.engine import EngineConfig
from planner.prediction.predict import Prediction
from planner.prediction.simulation import SimulationSummary

if TYPE_CHECKING:
    from planner.calibration.diff import CalibrationDiff
    from planner.plans.plan import Neighbour, Plan
    from planner.plans.scheduling import Scheduling
    from planner.search.study import Candidate
    from planner.validation.operators import OperatorError
    from planner.validation.validate import MetricError, Validation

GIB = 2**30

PIPED_WIDTH = 100
"""Columns of a report that does not go to a terminal."""

LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2el_ms"))

RATES = (
    ("Requests", "request_per_s", "/s"),
    ("Goodput", "goodput_request_per_s", "requests/s"),
    ("Output", "output_tok_per_s_per_gpu", "tokens/s/GPU"),
    ("Cost", "usd_per_million_output_tokens", "USD/M output tokens"),
    ("Energy", "output_tokens_per_joule", "output tokens/J"),
)


def print_plan(plan: Plan, *, gpu: str, workload: str, engine: str) -> None:
    """Print a plan: recommendation, prediction, memory, reasons, alternatives."""
    console = _console()
    best = plan.recommended
    if plan.status == "feasible":
        console.print(f"Recommended for {workload} on {gpu} (objective: {plan.objective})\n")
    else:
        console.print(f"No configuration for {workload} on {gpu} meets every limit; the nearest:\n")
    _print_config(console, best.config, engine=engine)
    _print_prediction_body(console, best)
    if plan.risk:
        held = 100 * (1 - plan.risk)
        console.print(f"  SLO checked at the upper end of the interval of {held:.0f} %")
    for relaxation in plan.relaxations:
        console.print(
            f"  to be feasible: {relaxation.limit} from {relaxation.given:.4g} "
            f"to {relaxation.needed:.4g}"
        )
    _print_neighbours(console, plan.neighbours)
    _print_scheduling(console, plan.scheduling)
    if plan.alternatives:
        console.print("\nBest rejected candidates")
        for alternative in plan.alternatives:
            console.print(
                f"  {_short(alternative.prediction.config)}: {alternative.rejected_because}"
            )
    if plan.search.pareto:
        _print_front(console, plan.search.pareto)
    console.print(
        f"\n{plan.search.num_evaluated} configurations evaluated in {plan.search.wall_s:.2f} s, "
        f"{len(plan.search.pareto)} on the Pareto front (--json lists them), "
        f"seed {plan.search.seed}"
    )


def print_prediction(
    prediction: Prediction, *, engine: str, notes: Mapping[str, Any] | None = None
) -> None:
    """Print what one configuration would do, and what the command found beside."""
    console = _console()
    _print_config(console, prediction.config, engine=engine)
    _print_prediction_body(console, prediction)
    notes = notes or {}
    if "found_rate_per_s" in notes:
        console.print(
            f"  highest rate that meets the SLO: {notes['found_rate_per_s']:.4g} requests/s"
        )
    for violation in notes.get("not_deployable", ()):
        console.print(f"  not deployable: {violation}")
    if notes.get("ignored_options"):
        ignored = ", ".join(notes["ignored_options"])
        console.print(f"  without effect on the prediction: {ignored}")


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
    from cost_models.engine_profile_io import list_engines  # noqa: PLC0415
    from cost_models.profile_io import list_gpus, list_models, load_gpu  # noqa: PLC0415
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


def _print_config(console: Console, config: EngineConfig, *, engine: str) -> None:
    fraction = "gpu_memory_utilization" if engine == "vllm" else "free_gpu_memory_fraction"
    table = Table(box=None, show_header=False, pad_edge=False)
    for line in (
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
        ("replicas", config.num_replicas, "moe_config.backend", config.moe_backend),
        ("max_batch_size", config.max_batch_size, "max_num_tokens", config.max_num_tokens),
        ("max_seq_len", config.max_seq_len, "tokens_per_block", config.tokens_per_block),
        (
            fraction,
            f"{getattr(config, fraction):g}",
            "capacity_scheduler_policy",
            config.capacity_scheduler_policy,
        ),
        (
            "enable_chunked_prefill",
            config.enable_chunked_prefill,
            "enable_block_reuse",
            config.enable_block_reuse,
        ),
        (
            "cuda_graph max_batch_size",
            config.cuda_graph_max_batch_size,
            "stream_interval",
            config.stream_interval,
        ),
    ):
        table.add_row(*(f"  {cell}" for cell in line))
    if config.speculates:
        cells = ("decoding_type", config.decoding_type, "max_draft_len", config.max_draft_len)
        table.add_row(*(f"  {cell}" for cell in cells))
    console.print(table)
    if config.speculates and config.speculative_model:
        console.print(f"  speculative_model            {config.speculative_model}")


def _print_prediction_body(console: Console, prediction: Prediction) -> None:
    _print_latencies(console, prediction)
    _print_rates(console, prediction)
    _print_quality(console, prediction)
    _print_simulation(console, prediction)
    _print_speculation(console, prediction)
    _print_memory(console, prediction)
    _print_steps(console, prediction)
    console.print(f"\nBinding limit: {prediction.binding_limit}")
    for name, excess in prediction.slo_excess.items():
        state = "met" if excess <= 0 else "MISSED"
        console.print(f"  SLO {name}: {state}, {100 * excess:+.0f} % of the limit")


def _print_speculation(console: Console, prediction: Prediction) -> None:
    found = prediction.speculation
    if found is None:
        return
    chances = ", ".join(f"{chance:.2f}" for chance in found.acceptance.conditional)
    console.print(
        f"  Drafts: {found.tokens_per_step:.2f} tokens a step; right with {chances} by position "
        f"in {100 * found.acceptance.draft_rate:.0f} % of the steps ({found.acceptance.source})"
    )


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
        console.print(
            f"  {'Headroom':9}{prediction.highest_rate_per_s:>10.4g} requests/s is the highest "
            "rate under the SLO"
        )


def _print_quality(console: Console, prediction: Prediction) -> None:
    """Print the expected loss with its interval and where it is from, if there is any."""
    quality = prediction.quality
    if not quality.sources:
        console.print(f"  {'Quality':9}{'':>10} as the published checkpoint")
        return
    low, high = quality.interval_90
    console.print(
        f"  {'Quality':9}{quality.loss_pct:>10.2f} % expected loss "
        f"({low:.2f} to {high:.2f}, {quality.provenance})"
    )
    for source in quality.sources:
        console.print(f"{'':21} {source.split(':')[0]}")


def _print_front(console: Console, front: Sequence[Candidate]) -> None:
    """Print what each amount of quality buys: the ends of the Pareto front."""
    console.print("\nPareto front by quality")
    levels = sorted({c.quality.loss_pct for c in front})
    for level in levels:
        alike = [c for c in front if c.quality.loss_pct == level]
        names = dict.fromkeys(
            f"{c.config.quantization} kv {c.config.kv_cache_dtype}" for c in alike
        )
        console.print(
            f"  {level:5.2f} % loss: {', '.join(names)}: up to "
            f"{max(c.tok_per_s_per_gpu for c in alike):.0f} tokens/s/GPU, or "
            f"{max(c.tok_per_s_per_user for c in alike):.0f} tokens/s/user ({len(alike)})"
        )


def _print_simulation(console: Console, prediction: Prediction) -> None:
    if prediction.simulation is None:
        console.print("  Latencies and rates are in closed form: nothing was simulated")
        return
    run = SimulationSummary.of(prediction.simulation)
    console.print(
        f"  Simulated {run.num_requests:,} requests in {run.num_steps:,} steps: "
        f"KV cache {100 * run.kv_mean_fraction:.0f} % used on average, "
        f"{100 * run.kv_max_fraction:.0f} % at most, {run.num_preemptions} preemptions"
    )
    if run.num_refused:
        console.print(f"  REFUSED: {run.num_refused} requests are longer than the engine takes")


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
    table = _table("ms per step", *prediction.step_time_breakdown["decode"])
    for step, families in prediction.step_time_breakdown.items():
        table.add_row(step, *(f"{1e3 * seconds:.2f}" for seconds in families.values()))
    console.print(table)
    for step, chains in prediction.fusion_savings.items():
        parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in chains.items())
        console.print(f"  Fusion saves {1e3 * sum(chains.values()):.2f} ms a {step} step: {parts}")


def _print_neighbours(console: Console, neighbours: Iterable[Neighbour]) -> None:
    console.print("\nWhat changing one knob would do")
    for neighbour in neighbours:
        console.print(f"  {neighbour.knob}={neighbour.value}: {neighbour.verdict}")


def _print_scheduling(console: Console, found: Scheduling) -> None:
    console.print("\nScheduling: other orders of the waiting queue")
    share = f"two or more requests wait for {100 * found.contention:.1f} % of the time"
    if not found.matters:
        console.print(f"  no difference: {share}, so nobody is overtaken")
    elif found.was_too_long:
        console.print(f"  {share}; --scheduling simulates what an order would do")
    for one in found.alternatives:
        gains = ", ".join(
            f"{_metric_title(name)} {100 * (pair[1] / pair[0] - 1):+.1f} %"
            for name, pair in one.changes.items()
            if pair[0]
        )
        how = f"offered: {one.how}" if one.how else f"not offered by {found.engine}"
        console.print(f"  {one.queue_order} ({one.requests}): {gains}; {how}")


def _metric_title(metric: str) -> str:
    name, _, statistic = metric.partition(".")
    titles = {f"{key}_ms": title for title, key in (("TTFT", "ttft"), ("E2E", "e2el"))}
    if name not in titles:
        return "goodput"
    return f"{statistic.upper() if statistic != 'mean' else 'mean'} {titles[name]}"


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


def _short(config: EngineConfig) -> str:
    parts = [config.quantization, f"kv {config.kv_cache_dtype}", f"TP{config.tensor_parallel_size}"]
    if config.pipeline_parallel_size > 1:
        parts.append(f"PP{config.pipeline_parallel_size}")
    if config.moe_expert_parallel_size > 1:
        parts.append(f"EP{config.moe_expert_parallel_size}")
    if config.enable_attention_dp:
        parts.append("attention DP")
    if config.num_replicas > 1:
        parts.append(f"{config.num_replicas} replicas")
    return " ".join([*parts, f"batch {config.max_batch_size}", f"tokens {config.max_num_tokens}"])


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
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
