"""The application: screens, theme, and what is kept between two runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.screen import Screen
from textual.widget import AwaitMount

from planner.tui.calibrating import own_calibrations
from planner.tui.catalogue import Catalogue
from planner.tui.messages import CatalogueRead, RunsValidated, Session, WorkerFailed
from planner.tui.screens import SCREENS
from planner.tui.screens.base import PlannerScreen
from planner.tui.screens.help import HelpScreen
from planner.tui.state import load_state, save_state
from planner.tui.themes import DEFAULT_THEME, THEMES
from planner.tui.worker import abandon_work, worker


class PlannerApp(App[int]):
    """Plan, ask what if, browse profiles and compare measured runs."""

    TITLE = "planner"
    CSS_PATH = "app.tcss"
    MODES: ClassVar[dict[str, str | Callable[[], Screen[Any]]]] = {}
    BINDINGS: ClassVar = [
        *(
            Binding(
                entry.key.lower(),
                f"switch_mode('{entry.mode}')",
                entry.title,
                show=False,
                priority=True,
            )
            for entry in SCREENS
        ),
        Binding("question_mark,f1", "show_keys", "Keys", key_display="?", priority=True),
        Binding("ctrl+t", "next_theme", "Theme", show=False),
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(
        self,
        *,
        state_file: Path,
        given: Mapping[str, str] | None = None,
        search_effort: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the application.

        Args:
            state_file: What is kept between two runs; the user's calibrations lie beside it.
            given: Fields of the form, over those that were kept.
            search_effort: `trials` and `time_budget_s` of a search; else the defaults of `plan`.
        """
        self.state, self.state_notice = load_state(state_file)
        self.may_take_local_gpu = not state_file.exists() and not (given or {}).get("gpu")
        """At the first start the GPUs of this machine are planned for."""
        # Textual's default screen is the first that is wanted: each is styled and painted once.
        known = self.state.screen in _SCREENS
        self.DEFAULT_MODE = self.state.screen if known else "plan"  # type: ignore[misc]
        super().__init__()
        self.state_file = state_file
        self.search_effort = dict(search_effort or {})
        stated = {name: value for name, value in (given or {}).items() if value}
        if stated.get("workload") and "model" not in stated:
            stated["model"] = ""
        question = replace(self.state.question, **stated)
        self.state = replace(self.state, question=question)
        self.session: Session | None = None
        self.validation: RunsValidated | None = None
        self.catalogue = Catalogue()
        for theme in THEMES:
            self.register_theme(theme)
        known = self.state.theme in self.available_themes
        self.theme = self.state.theme if known else DEFAULT_THEME

    def get_default_screen(self) -> Screen[Any]:
        """Return the screen of the last time."""
        return _SCREENS[self.DEFAULT_MODE].build()

    def on_mount(self) -> None:
        """Let the other screens be built when they are first opened."""
        for entry in SCREENS:
            self.add_mode(entry.mode, entry.build)
        if self.state_notice:
            self.notify(self.state_notice, severity="warning", markup=False)
        # The frame first: what fills it comes after the first paint.
        self.call_after_refresh(self.after_first_paint)

    def after_first_paint(self) -> None:
        """Read the lists; leave what is there by now out of every garbage collection."""
        if not gc.isenabled():
            gc.freeze()
            gc.enable()
        self.read_profiles()

    @work(thread=True, group="catalogue", exit_on_error=False)
    def read_profiles(self) -> None:
        """Let another process read what is shipped."""
        from planner.tui import jobs  # noqa: PLC0415  first paint

        try:
            self.post_message(CatalogueRead(worker("simulate").run(jobs.read_profiles)))
        except Exception as error:  # noqa: BLE001  the worker's edge
            self.post_message(WorkerFailed("Reading the profiles", str(error) or repr(error)))

    @on(CatalogueRead)
    def keep_catalogue(self, event: CatalogueRead) -> None:
        """Fill the lists."""
        self.catalogue = event.catalogue
        for screen in self.screen_stack:
            if isinstance(screen, PlannerScreen):
                screen.on_catalogue()

    @on(WorkerFailed)
    def show_failure(self, event: WorkerFailed) -> None:
        """Say that a worker failed."""
        self.notify(
            f"{event.task} failed: {event.reason}", severity="error", timeout=15, markup=False
        )

    def on_resize(self) -> None:
        """Paint everything: a terminal that went to another size and back forgot what it showed."""
        self.screen.refresh()

    @property
    def calibration_folder(self) -> Path:
        """Where the user's own calibrations lie."""
        return self.state_file.parent / "calibrations"

    def own_calibrations(self) -> dict[str, str]:
        """Return the user's own calibration files by engine."""
        return own_calibrations(self.calibration_folder)

    def calibration_in_force(self, engine: str) -> tuple[str, float]:
        """Return the user's own file for an engine and when it was written, in s since 1970."""
        path = self.own_calibrations().get(engine, "")
        return path, Path(path).stat().st_mtime if path else 0.0

    def remember(self, **changes: Any) -> None:
        """Keep part of the state for the next time; written when the program ends."""
        self.state = replace(self.state, **changes)

    def on_unmount(self) -> None:
        """Write the state, and end what goes on; a measurement ends its server by itself."""
        abandon_work("search", "simulate", "calibrate", "ladder")
        save_state(self.state_file, replace(self.state, theme=self.theme))

    def switch_mode(self, mode: str) -> AwaitMount:
        """Open a screen, and remember it."""
        self.remember(screen=mode)
        return super().switch_mode(mode)

    def action_show_keys(self) -> None:
        """Show the keys of the screen, or close them."""
        screen = self.screen
        if isinstance(screen, HelpScreen):
            screen.dismiss()
        elif isinstance(screen, PlannerScreen):
            self.push_screen(HelpScreen(screen.HELP_TEXT, _keys(screen)))

    def action_next_theme(self) -> None:
        """Go on to the next of light, dark and monochrome."""
        names = [theme.name for theme in THEMES]
        at = names.index(self.theme) if self.theme in names else -1
        self.theme = names[(at + 1) % len(names)]
        self.notify(f"Theme {self.theme}", timeout=2)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Add the screens and what the present one can do to the command palette."""
        own = {"Keys"}  # Textual's panel of keys; ours says what the screen is for
        yield from (c for c in super().get_system_commands(screen) if c.title not in own)
        yield SystemCommand("Keys", "What this screen is for, and its keys", self.action_show_keys)
        for owner, binding, enabled, _ in screen.active_bindings.values():
            if owner is screen and enabled:
                action = partial(screen.run_action, binding.action)
                key = self.get_key_display(binding)
                yield SystemCommand(binding.description, f"{key} on this screen", action)
        for entry in SCREENS:
            yield SystemCommand(
                f"Go to {entry.title}",
                entry.key,
                partial(self.run_action, f"switch_mode('{entry.mode}')"),
            )


_SCREENS = {entry.mode: entry for entry in SCREENS}


def _keys(screen: PlannerScreen) -> list[tuple[str, str]]:
    """Return every key that works on a screen now, with what it does."""
    keys: dict[str, str] = {}
    for _, binding, enabled, _ in screen.active_bindings.values():
        if enabled and binding.description:
            display = screen.app.get_key_display(binding)
            keys[display] = binding.description
    return sorted(keys.items())
