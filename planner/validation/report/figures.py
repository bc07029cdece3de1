"""The report's plots, as SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cost_models.profile_io import load_model
from planner.validation.report.detail import LATENCIES, Detail, measured_latencies
from planner.validation.report.learning_curve import Point
from planner.validation.report.pareto import Front
from planner.validation.report.tables import (
    HEADLINES,
    error_pct,
    load_regime,
    load_regimes,
    scored_headlines,
)
from planner.validation.validate import Row

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""

COLOURS = ("#2f86c9", "#e0812b", "#2ea67a", "#c8589f", "#8d73d9", "#a98f00", "#d1495b")
"""Told apart on white and on black, and by most colour-blind readers (after Okabe and Ito)."""

WIDTH_IN = 9.2

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.titlesize": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

SCATTERED = (
    "ttft_ms.mean", "tpot_ms.mean", "e2el_ms.p50", "ttft_ms.p99", "itl_ms.p99", "output_tok_per_s",
)  # fmt: skip


AXES = {"ttft_ms": "TTFT, ms", "tpot_ms": "TPOT, ms", "e2el_ms": "E2E, ms"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One figure of the report."""

    name: str
    title: str
    note: str
    svg: str
    """A whole `<svg>` element; lines and text take the colour of the text around it."""


def scatter(rows: Sequence[Row]) -> Picture | None:
    """Predicted against measured, one panel a metric, with intervals."""
    names = [n for n in SCATTERED if any(n in set(row.scored()) for row in rows)]
    if not names:
        return None
    models = list(dict.fromkeys(_model_name(row) for row in rows))

    def draw(figure: Figure) -> None:
        for axes, name in zip(_panels(figure, len(names)), names, strict=True):
            _scatter_panel(axes, [row for row in rows if name in set(row.scored())], name, models)
        _legend(figure, models)

    return _picture(
        "scatter",
        "Predicted against measured",
        "One point a run, its bar the 90 % interval; on the diagonal the prediction is exact.",
        _height(len(names)),
        draw,
    )


def _scatter_panel(axes: Axes, rows: Sequence[Row], name: str, models: Sequence[str]) -> None:
    for row in rows:
        measured, predicted = row.run.measured[name], row.predicted[name]
        low, high = row.intervals[name]
        bars = [[max(predicted - low, 0.0)], [max(high - predicted, 0.0)]]
        colour = _colour(models.index(_model_name(row)))
        axes.errorbar(
            measured, predicted, yerr=bars, fmt="o", ms=3.5, lw=0.9, color=colour, alpha=0.85
        )
    values = [v for row in rows for v in (row.run.measured[name], row.predicted[name])]
    ends = (0.8 * min(values), 1.25 * max(values))
    axes.plot(ends, ends, color=INK, lw=0.7, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlim=ends, xlabel="measured", ylabel="predicted")
    axes.set_title(HEADLINES[name])
    for axis in (axes.xaxis, axes.yaxis):
        _plain_log_ticks(axis)


def errors_by_load(rows: Sequence[Row]) -> Picture | None:
    """The error of every run by metric, coloured by load regime."""
    names = [n for n in HEADLINES if any(n in scored_headlines(row) for row in rows)]
    regimes = load_regimes(rows)
    if not names:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, regime in enumerate(regimes):
            offset = 0.7 * ((number + 0.5) / len(regimes) - 0.5)
            points = [
                (error_pct(row, name), names.index(name) + offset)
                for row in rows
                if load_regime(row) == regime
                for name in scored_headlines(row)
            ]
            axes.plot(*zip(*points, strict=True), "o", ms=3.5, color=_colour(number), alpha=0.75)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_yticks(range(len(names)), [HEADLINES[name] for name in names])
        axes.set(xlabel="error, % of the measurement", ylim=(len(names) - 0.5, -0.5))
        _legend(figure, regimes)

    height = 1.1 + 0.34 * len(names)
    return _picture(
        "errors", "Error by metric and load", "One point a run; right of 0: predicted too high.",
        height, draw,
    )  # fmt: skip


def pareto(fronts: Sequence[Front]) -> Picture | None:
    """Throughput against speed for one user: predicted over the clients, measured on it."""
    if not fronts:
        return None

    def draw(figure: Figure) -> None:
        for axes, front in zip(_panels(figure, len(fronts)), fronts, strict=True):
            axes.plot(front.speed, front.throughput, color=_colour(0), lw=1.4)
            for run in front.measured:
                axes.plot(run.speed, run.throughput, "o", ms=5, color=_colour(1))
                axes.annotate(
                    f"{run.clients:g}", (run.speed, run.throughput), xytext=(5, 4),
                    textcoords="offset points", fontsize=8,
                )  # fmt: skip
            axes.set(xlabel="output tokens/s of one user", ylabel="output tokens/s/GPU")
            axes.set(xlim=(0, None), ylim=(0, None))
            axes.set_title(front.title, fontsize=8.5)
        _legend(figure, ("predicted", "measured (clients)"), styles=("-", "o"))

    return _picture(
        "pareto",
        "Pareto: throughput against speed",
        "Closed loops of one configuration: simulated over the number of clients, with what was "
        "measured on it.",
        _height(len(fronts)),
        draw,
    )


def kv_occupancy(details: Sequence[Detail]) -> Picture | None:
    """KV blocks in use over the simulated time."""
    if not details:
        return None

    def draw(figure: Figure) -> None:
        for axes, detail in zip(_panels(figure, len(details)), details, strict=True):
            seen = detail.timeline
            if seen is None:
                continue
            used = 100 * seen.used_blocks / seen.capacity_blocks
            axes.fill_between(seen.at_s, used, color=_colour(0), alpha=0.3, lw=0)
            axes.plot(seen.at_s, used, color=_colour(0), lw=1)
            waiting = axes.twinx()
            waiting.plot(seen.at_s, seen.waiting, color=_colour(1), lw=0.9)
            waiting.set_ylabel("requests waiting", color=_colour(1))
            waiting.spines["right"].set_visible(True)
            waiting.grid(visible=False)
            waiting.set_ylim(0, max(1.0, float(seen.waiting.max()) * 1.1))
            axes.set(xlabel="simulated time, s", ylabel="KV blocks used, %", ylim=(0, 105))
            axes.set_title(_run_title(detail.row), fontsize=8.5)

    return _picture(
        "kv",
        "KV occupancy over time",
        "Simulated, for the runs that use most of their KV cache; runs do not record it.",
        _height(len(details), columns=2),
        draw,
    )


def distributions(details: Sequence[Detail]) -> Picture | None:
    """Cumulative latencies of the requests, predicted over measured."""
    if not details:
        return None

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(details), len(LATENCIES), squeeze=False)
        for line, detail in zip(grid, details, strict=True):
            measured = measured_latencies(detail.row.run)
            predicted = detail.predicted_latencies()
            for axes, name in zip(line, LATENCIES, strict=True):
                axes.ecdf(measured[name], color=_colour(1), lw=2.2, alpha=0.65)
                axes.ecdf(predicted[name], color=_colour(0), lw=1.2)
                both = np.concatenate([measured[name], predicted[name]])
                if both.min() < both.max() / 2:
                    axes.set_xlim(0, None)
                axes.set_xlabel(AXES[name])
            line[0].set_ylabel("share of requests")
            line[1].set_title(_run_title(detail.row), fontsize=8.5)
        _legend(figure, ("predicted", "measured"), styles=("-", "-"))

    return _picture(
        "distributions",
        "Latency distributions, predicted over measured",
        "The runs with the best, the median and the worst E2E median.",
        0.6 + 2.1 * len(details),
        draw,
    )


def learning_curve(points: Sequence[Point]) -> Picture | None:
    """Error on held-out runs against the number of fitted ones."""
    if not points:
        return None
    metrics = list(dict.fromkeys(name for point in points for name in point.mape_pct))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, name in enumerate(metrics):
            known = [(p.num_runs, p.mape_pct[name]) for p in points if name in p.mape_pct]
            axes.plot(*zip(*known, strict=True), "o-", ms=4, color=_colour(number))
        axes.set_xticks(sorted({point.num_runs for point in points}))
        axes.set(xlabel="serving runs fitted", ylabel="error on held-out runs, %", ylim=(0, None))
        _legend(figure, [HEADLINES.get(name, name) for name in metrics])

    return _picture("learning", "Learning curve", "Error on runs that were held out.", 3.4, draw)


def _picture(
    name: str, title: str, note: str, height_in: float, draw: Callable[[Figure], None]
) -> Picture:
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_IN, height_in))
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    return Picture(name=name, title=title, note=note, svg=_embeddable(text.getvalue(), name, title))


_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _embeddable(svg: str, name: str, title: str) -> str:
    """Return the `<svg>` element alone: no outside reference, ids of its own, the page's ink."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _panels(figure: Figure, count: int) -> Iterator[Axes]:
    """Yield so many axes, at most three beside each other; what is left of the grid stays empty."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    yield from grid[:count]


def _height(count: int, *, columns: int = 3) -> float:
    columns = 2 if count in (2, 4) else min(count, columns)
    return 0.6 + 2.6 * -(-count // columns)


def _legend(figure: Figure, names: Sequence[str], *, styles: Sequence[str] = ()) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    styles = styles or ["o"] * len(names)
    handles = [
        Line2D([], [], color=_colour(number), lw=1.8, ls="-" if style == "-" else "",
               marker="o" if style == "o" else "", ms=5)
        for number, style in enumerate(styles)
    ]  # fmt: skip
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _plain_log_ticks(axis: Any) -> None:
    """Label a short logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _model_name(row: Row) -> str:
    """Return a model's own name, however the run spells it."""
    return load_model(row.run.model).name


def _run_title(row: Row) -> str:
    run = row.run
    return run.run_id.removeprefix(f"{run.gpu.partition('_')[0]}_{run.engine}_")
