"""The main screens: a file and a row of `SCREENS` each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual.screen import Screen


@dataclass(frozen=True, slots=True)
class ScreenEntry:
    """A main screen, and where it is found; it is loaded when it is first opened."""

    mode: str
    key: str
    title: str
    home: str
    """`module:class`, the class made without arguments."""

    def build(self) -> Screen[Any]:
        """Return a new screen."""
        module, _, name = self.home.partition(":")
        screen: Screen[Any] = getattr(import_module(module), name)()
        return screen


SCREENS = (
    ScreenEntry("plan", "F2", "Plan", "planner.tui.screens.plan:PlanScreen"),
    ScreenEntry("what_if", "F3", "What if", "planner.tui.screens.what_if:WhatIfScreen"),
    ScreenEntry("profiles", "F4", "Profiles", "planner.tui.screens.profiles:ProfilesScreen"),
    ScreenEntry("measure", "F5", "Measure", "planner.tui.screens.measure:MeasureScreen"),
    ScreenEntry("runs", "F6", "Runs", "planner.tui.screens.runs:RunsScreen"),
    ScreenEntry("calibrate", "F7", "Calibrate", "planner.tui.screens.calibrate:CalibrateScreen"),
)
"""In the order of their keys."""
