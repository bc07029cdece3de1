"""A prediction and a configuration as tables."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from planner.percent import probability_words
from planner.plans.plan import Plan
from planner.prediction.predict import Prediction
from planner.text.lines import (
    FRONT_TITLE,
    LATENCIES,
    RATES,
    SCHEDULING_TITLE,
    front_lines,
    fusion_lines,
    loss_words,
    scheduling_lines,
    speculation_words,
)
from planner.tui.text import bound, milliseconds, number, short_split

SHOWN_STATISTICS = ("p50", "p90", "p99")

SHORT_UNITS = {
    "requests/s": "/s",
    "tokens/s/GPU": "tok/s/GPU",
    "output tokens/J": "tok/J",
    "USD/M output tokens": "USD/Mtok",
}


def config_table(deployment: Deployment) -> Table:
    """Return a deployment under TensorRT-LLM's names."""
    config = deployment.config
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    rows = (
        ("quantization", f"{config.quantization}, KV {config.kv_cache_dtype}"),
        ("parallel sizes", _parallel(config)),
        ("servers", _servers(deployment)),
        ("max_batch_size", str(config.max_batch_size)),
        ("max_num_tokens", str(config.max_num_tokens)),
        ("max_seq_len", str(config.max_seq_len)),
        ("tokens_per_block", str(config.tokens_per_block)),
        ("free_gpu_memory_fraction", f"{config.free_gpu_memory_fraction:g}"),
        ("capacity_scheduler_policy", config.capacity_scheduler_policy),
        ("enable_chunked_prefill", str(config.enable_chunked_prefill).lower()),
    )
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value)
    return table


def latency_table(prediction: Prediction) -> Table:
    """Return predicted latencies in ms with the interval of P99 and what the SLO allows."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("ms")
    for title in ("P50", "P90", "P99"):
        table.add_column(title, justify="right")
    table.add_column("P99, 90 %", justify="right")
    for title, metric in LATENCIES:
        low, high = prediction.metrics[f"{metric}.p99"].interval_90
        cells = [milliseconds(prediction.value(f"{metric}.{s}")) for s in SHOWN_STATISTICS]
        table.add_row(title, *cells, f"{milliseconds(low)}–{milliseconds(high)}")
    return table


def slo_lines(prediction: Prediction) -> Text:
    """Return each limit of the SLO, met or missed, by how much, and the probability that it holds.

    Short enough for one line of the smallest column.
    """
    text = Text()
    for name, excess in prediction.slo_excess.items():
        # Of a metric that is 0, the excess does not tell the limit.
        value = prediction.value(name)
        limit = f" ≤ {number(value / (1 + excess))}" if excess > -1 and value > 0 else ""
        state, sign = ("by", "✓") if excess <= 0 else ("MISSED by", "✗")
        words = f"{sign} {name}{limit}: {state} {100 * abs(excess):.0f} %"
        if name in prediction.slo_probability:
            likely = probability_words(prediction.slo_probability[name])
            words += f", P{likely}" if likely[0] in "<>" else f", P={likely}"
        text.append(f"{words}\n", style="" if excess <= 0 else "bold")
    return text


def rate_table(prediction: Prediction) -> Table:
    """Return rates, cost and energy, each with its 90 % interval."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    for title, name, unit in RATES:
        metric = prediction.metrics[name]
        low, high = metric.interval_90
        label = f"{title} {SHORT_UNITS.get(unit, unit)}"
        table.add_row(label, number(metric.value), f"{bound(low)}–{bound(high)}")
    if prediction.highest_rate_per_s > 0:
        table.add_row("Highest rate /s", number(prediction.highest_rate_per_s), "under the SLO")
    return table


def prediction_view(prediction: Prediction) -> Group:
    """Return everything that is predicted but memory."""
    provenance = prediction.metrics["ttft_ms.mean"].provenance
    source = "Simulated" if prediction.simulation else "Closed form"
    return Group(
        latency_table(prediction),
        Text(),
        slo_lines(prediction),
        rate_table(prediction),
        quality_lines(prediction),
        Text(),
        Text(f"Binding limit: {prediction.binding_limit}", style="bold"),
        *technique_lines(prediction),
        Text(f"{source}, {provenance}; intervals hold 90 %", style="dim"),
    )


def quality_lines(prediction: Prediction) -> Text:
    """Return the expected loss with its interval, and who published or measured it."""
    quality = prediction.quality
    text = Text(f"Quality: {loss_words(quality)}")
    for source in quality.sources:
        text.append(f"\n  {source.split(':')[0]}", style="dim")
    return text


def technique_lines(prediction: Prediction) -> list[Text]:
    """Return what drafts yield, if there are any, and what fused kernels save."""
    lines = [speculation_words(prediction.speculation)] if prediction.speculation else []
    return [Text(line) for line in (*lines, *fusion_lines(prediction.fusion_savings))]


def reasons_view(plan: Plan) -> Group:
    """Return what would make a plan feasible, why not the others, and what a change would do."""
    lines: list[Text] = []
    for relaxation in plan.relaxations:
        lines.append(
            Text(
                f"✗ to be feasible: {relaxation.limit} from {number(relaxation.given)} "
                f"to {number(relaxation.needed)}",
                style="bold",
            )
        )
    lines.append(Text("Why not the others", style="bold"))
    for alternative in plan.alternatives:
        lines.append(Text(f"• {short_split(alternative.prediction.deployment)}"))
        lines.append(Text(f"    {alternative.rejected_because}", style="dim"))
    lines.append(Text("\nChanging one knob", style="bold"))
    lines += [Text(f"• {n.knob}={n.value}: {n.verdict}") for n in plan.neighbours]
    if plan.search.pareto:
        lines.append(Text(f"\n{FRONT_TITLE}", style="bold"))
        lines += [Text(f"• {line.strip()}") for line in front_lines(plan.search.pareto)]
    lines.append(Text(f"\n{SCHEDULING_TITLE}", style="bold"))
    lines += [Text(f"• {line}") for line in scheduling_lines(plan.scheduling)]
    return Group(*lines)


def _parallel(config: EngineConfig) -> str:
    parts = [f"TP {config.tensor_parallel_size}", f"PP {config.pipeline_parallel_size}"]
    if config.moe_expert_parallel_size > 1:
        parts.append(f"EP {config.moe_expert_parallel_size}")
    if config.enable_attention_dp:
        parts.append("attention DP")
    return ", ".join(parts)


def _servers(deployment: Deployment) -> str:
    """Return how many servers there are, on how many GPUs, behind which router."""
    if deployment.num_servers == 1:
        gpus = f"{deployment.num_gpus} GPUs" if deployment.num_gpus > 1 else "1 GPU"
        return f"1 on {gpus}"
    return f"{deployment.num_servers} on {deployment.num_gpus} GPUs, {deployment.router}"
