"""The report as a file that a browser opens offline, with the numbers of `--json`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from planner.validation.report.tables import HEADLINES

ROOT = Path(__file__).parents[3]

RUNS = ROOT / "profiles/runs/h200_vllm/runs.jsonl"

CURVE = {
    "points": [
        {"num_runs": 0, "label": "shipped", "mape_pct": {"tpot_ms.mean": 6.04}},
        {"num_runs": 8, "mape_pct": {"tpot_ms.mean": 2.51, "ttft_ms.mean": 9.96}},
    ]
}

VOID = {"meta", "br", "link", "img", "input", "hr", "base"}

FIGURES = {"scatter", "errors", "pareto", "kv", "distributions", "learning"}


class Page(HTMLParser):
    """What matters of a page: its tables, ids, references, tags and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.styles = ""
        self.open: list[str] = []
        self.name = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(str(value))
            if value and "url(" in value:
                self.references += re.findall(r"url\((.*?)\)", value)
            if tag == "table" and name == "data-name":
                self.name = str(value)
                self.tables[self.name] = []
        if tag == "tr":
            self.tables[self.name].append([])
        if tag in ("td", "th"):
            self.tables[self.name][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self.name][-1][-1] += data
        if self.open and self.open[-1] == "style":
            self.styles += data


@dataclass
class Written:
    folder: Path
    content: dict[str, Any]
    page: Page
    text: str
    markdown: dict[str, list[list[str]]] = field(default_factory=dict)


def validate(*arguments: object, without: str = "") -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys\nif {without!r}: sys.modules[{without!r}] = None\n"
        "sys.argv[0] = 'planner'\nfrom planner.cli.main import main\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "validate", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("a report")
    curve = folder / "curve.json"
    curve.write_text(json.dumps(CURVE))
    result = validate(RUNS, "--report", folder / "out", "--learning-curve", curve, "--json")
    assert result.returncode == 0, result.stderr
    text = (folder / "out/report.html").read_text()
    content = json.loads(result.stdout)
    return Written(folder / "out", content, Page(text), text)


def number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def same(shown: Sequence[str], said: Sequence[Any]) -> bool:
    return [number(cell) for cell in shown] == [
        float(cell) if isinstance(cell, int | float) else number(cell) for cell in said
    ]


def test_nothing_outside_the_file_is_asked_for(written: Written) -> None:
    page = written.page
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    # The names of the SVG namespaces are no addresses.
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", written.text)
    assert "http" not in outside
    assert "prefers-color-scheme: dark" in page.styles
    assert "@media print" in page.styles


def test_every_table_says_what_json_says(written: Written) -> None:
    tables = {table["name"]: table for table in written.content["report"]["tables"]}
    assert set(tables) == set(written.page.tables)
    assert set(tables) == {
        "overall", "by_model", "by_regime", "learning", "worst", "range", "runs",
    }  # fmt: skip
    for name, table in tables.items():
        header, *rows = written.page.tables[name]
        assert header == table["columns"]
        assert len(rows) == len(table["rows"]) > 0
        assert all(same(*pair) for pair in zip(rows, table["rows"], strict=True)), name


def test_errors_are_those_of_the_validation(written: Written) -> None:
    names = (
        "mape_pct", "median_ape_pct", "bias_pct", "coverage_90_pct", "interval_90_rel_width_pct",
    )  # fmt: skip

    def cells(error: dict[str, float]) -> list[float]:
        return [error["n"], *(error[name] for name in names)]

    overall = written.content["overall"]["metrics"]
    for row in written.page.tables["overall"][1:]:
        assert [number(c) for c in row[1:]] == pytest.approx(cells(overall[row[0]]), abs=0.051)
    titles = {title: name for name, title in HEADLINES.items()}
    groups = {(g["gpu"], g["engine"], g["model"]): g for g in written.content["groups"]}
    shown = written.page.tables["by_model"][1:]
    for row in shown:
        error = groups[row[0], row[1], row[2]]["metrics"][titles[row[3]]]
        assert [number(c) for c in row[4:]] == pytest.approx(cells(error), abs=0.051)
    assert {tuple(row[:3]) for row in shown} == set(groups)
    # Load regimes part the runs: their counts add up.
    counts: dict[str, float] = {}
    for row in written.page.tables["by_regime"][1:]:
        counts[row[1]] = counts.get(row[1], 0) + float(row[2])
    assert counts == {HEADLINES[n]: e["n"] for n, e in overall.items() if n in HEADLINES}


def test_runs_show_what_was_measured_and_predicted(written: Written) -> None:
    titles = {title: name for name, title in HEADLINES.items()}
    runs = {row["run_id"]: row for row in written.content["rows"]}
    inside = 0
    for run, metric, *cells, said in written.page.tables["runs"][1:]:
        name = titles[metric]
        *values, error = (float(cell.replace(",", "")) for cell in cells)
        true = runs[run]["measured"][name], runs[run]["predicted"][name]
        assert values[:2] == pytest.approx(list(true), rel=6e-4)
        assert error == pytest.approx(100 * (true[1] / true[0] - 1), abs=0.051)
        assert values[2] <= values[1] <= values[3]
        inside += said == "yes"
    headline = [e for n, e in written.content["overall"]["metrics"].items() if n in HEADLINES]
    assert inside == round(sum(e["n"] * e["coverage_90_pct"] / 100 for e in headline))


def test_worst_cases_name_what_takes_the_time(written: Written) -> None:
    rows = written.page.tables["worst"][1:]
    worst = {row[0]: abs(float(row[5])) for row in reversed(rows)}
    for run in written.page.tables["runs"][1:]:
        assert abs(float(run[6])) <= worst[run[1]]
    timed = [row for row in rows if row[0].startswith(("TPOT", "output"))]
    assert timed
    for row in timed:
        assert row[7].startswith(f"{row[8]} ")
        assert row[9] == "none" or float(row[9]) > 0


def test_the_markdown_says_the_same_with_its_pictures(written: Written) -> None:
    text = (written.folder / "report.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rows = [row for row in rows if not row[0].startswith("--")]
    assert rows == [row for table in written.page.tables.values() for row in table]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {Path(name).stem for name in pictures} == FIGURES
    for name in pictures:
        assert ET.parse(written.folder / name).getroot().tag.endswith("svg")  # noqa: S314
    assert {f"figure-{name}" for name in FIGURES} <= set(written.page.ids)


def test_the_commands_can_be_typed(written: Written) -> None:
    command = written.content["report"]["commands"][0]
    assert f"--report '{written.folder}'" in command
    assert command in written.text.replace("&#39;", "'")


def small_run(**changes: Any) -> dict[str, Any]:
    return {
        "run_id": "<script>alert(1)</script> | $x$",
        "gpu": "h100_sxm",
        "engine": "trtllm",
        "model": "llama-3.1-8b",
        "config": {"quantization": "bf16"},
        "workload": {"protocol": "closed_loop", "concurrency": 4, "isl": 512, "osl": 32},
        "measured": {"tpot_ms": {"mean": 7.0}, "output_tok_per_s": 500.0},
    } | changes


def test_names_from_files_are_text(tmp_path: Path) -> None:
    capacity = small_run(
        run_id="c", workload={"protocol": "capacity"}, measured={"max_sequences": 20.0}
    )
    unknown = small_run(run_id="<b>unknown</b>", gpu="<b>abacus</b>")
    lines = [json.dumps(run) for run in (small_run(), capacity, unknown)]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    result = validate(tmp_path / "runs.jsonl", "--report", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    page = Page((tmp_path / "out/report.html").read_text())
    assert "script" not in page.tags
    assert page.tables["runs"][1][0] == small_run()["run_id"]
    assert "abacus" in page.tables["skipped"][1][1]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("curve", "word"),
    [
        ("{", "curve.json"),
        ("{}", "accepted"),
        ('{"points": []}', "empty"),
        ('{"points": [{"num_runs": -1, "mape_pct": {}}]}', "num_runs"),
        ('{"points": [{"num_runs": 1, "mape_pct": {"tpot_ms.mean": "inf"}}]}', "finite"),
    ],
)
def test_a_damaged_learning_curve_is_one_line(tmp_path: Path, curve: str, word: str) -> None:
    (tmp_path / "runs.jsonl").write_text(json.dumps(small_run()))
    (tmp_path / "curve.json").write_text(curve)
    result = validate(
        tmp_path / "runs.jsonl", "--report", tmp_path / "out",
        "--learning-curve", tmp_path / "curve.json",
    )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert word in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_one_line_before_any_work(tmp_path: Path, library: str) -> None:
    result = validate(RUNS, "--report", tmp_path / "out", without=library)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        f"error: --report needs {library}; pip install 'trtllm-planner[report]'"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [(RUNS, "--learning-curve", "c.json"), ("--operators", "table.csv", "--report", "out")],
)
def test_options_that_do_nothing_are_refused(arguments: tuple[object, ...]) -> None:
    result = validate(*arguments)
    assert result.returncode == 2
    assert "--report" in result.stderr
