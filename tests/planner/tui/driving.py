"""Drives the interface as a person would, and reads what it shows."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widget import Widget
from textual.widgets import Input, Static

from planner.tui.app import PlannerApp
from planner.tui.screens.plan import PlanScreen

WIDE, SMALL = (120, 40), (80, 24)

FEW_TRIALS = {"trials": 1}
"""A search that is soon done."""


@asynccontextmanager
async def planner_at(
    folder: Path,
    size: tuple[int, int] = WIDE,
    effort: Mapping[str, Any] | None = None,
    **given: str,
) -> AsyncIterator[Pilot[int]]:
    """Open the interface with its state in a folder of its own; the search is a short one."""
    effort = FEW_TRIALS if effort is None else effort
    app = PlannerApp(state_file=folder / "tui.json", given=given, search_effort=effort)
    app.animation_level = "none"  # what glides is waited for
    async with app.run_test(size=size, notifications=True) as pilot:
        yield pilot


def app_of(pilot: Pilot[int]) -> PlannerApp:
    """Return the application as what it is."""
    assert isinstance(pilot.app, PlannerApp)
    return pilot.app


async def until(pilot: Pilot[int], condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something holds and is drawn; fail with the screen's text if it never does."""
    for _ in range(int(seconds / 0.05)):
        if condition():
            await _drawn(pilot)
            return
        await pilot.pause(0.05)
    raise AssertionError(f"it did not happen; the screen shows:\n{shown(pilot)}")


async def _drawn(pilot: Pilot[int]) -> None:
    """Wait until the screen stands still; one that never does is left moving."""
    before = ""
    for _ in range(10):
        await pilot.pause(0.02)
        now = shown(pilot)
        if now == before:
            return
        before = now


async def sees(pilot: Pilot[int], *words: str) -> None:
    """Wait until the screen shows all the words."""
    await until(pilot, lambda: all(word in shown(pilot) for word in words))


async def planned(pilot: Pilot[int]) -> PlanScreen:
    """Wait for the recommendation."""
    await until(pilot, lambda: "★" in text_of(pilot, "#headline"))
    screen = pilot.app.screen
    assert isinstance(screen, PlanScreen)
    return screen


async def fill(pilot: Pilot[int], name: str, text: str) -> None:
    """Replace the text of a field of the form by typing."""
    field = pilot.app.screen.query_one(f"#field-{name} Input", Input)
    field.focus()
    await pilot.press("end", "ctrl+u", *typed(text))


def typed(text: str) -> Iterator[str]:
    """Return the key of each letter."""
    names = {".": "full_stop", "/": "slash", "_": "underscore", "-": "minus", "=": "equals_sign"}
    names |= {" ": "space", ",": "comma"}
    return (names.get(letter, letter) for letter in text)


def text_of(pilot: Pilot[int], selector: str) -> str:
    """Return the text of a widget as it is rendered."""
    return plain(pilot.app.screen.query_one(selector, Static))


def plain(widget: Widget) -> str:
    """Return the rendered text of a widget."""
    lines = [widget.render_line(y).text for y in range(widget.size.height)]
    return "\n".join(line.rstrip() for line in lines)


def shown(pilot: Pilot[int]) -> str:
    """Return the whole screen as text."""
    lines = pilot.app.screen._compositor.render_strips()
    return "\n".join(strip.text.rstrip() for strip in lines)


async def picture(pilot: Pilot[int], title: str = "") -> str:
    """Return the screen as SVG: no blinking cursor, no passing notice, nothing that varies."""
    for text in pilot.app.screen.query(Input):
        text.cursor_blink = False
    pilot.app.clear_notifications()
    await _drawn(pilot)
    return compact(pilot.app.export_screenshot(title=title))


def compact(svg: str) -> str:
    """Return a picture without the long names and spelled-out blanks that make up half of it."""
    svg = re.sub(r"terminal-\d+", "t", svg)
    svg = re.sub(r'\s*clip-path="url\(#t-line-\d+\)"', "", svg)
    svg = re.sub(r'<clipPath id="t-line-\d+">.*?</clipPath>', "", svg, flags=re.DOTALL)
    svg = svg.replace(' shape-rendering="crispEdges"', "")
    svg = svg.replace("<svg ", '<svg shape-rendering="crispEdges" ', 1)
    svg = svg.replace("&#160;", "\N{NO-BREAK SPACE}")
    return re.sub(r">[ \t]*\n\s*<", ">\n<", svg)


def problem_at(pilot: Pilot[int], name: str) -> str:
    """Return what a field of the form says is wrong with it."""
    field = pilot.app.screen.query_one(f"#field-{name}")
    is_wrong = field.has_class("-wrong")
    return " ".join(plain(field.query_one(".below", Static)).split()) if is_wrong else ""
