"""End to end in tmux: types as a person would and reads the screen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.planner.tui.test_measure_and_calibrate import TINY

ROOT = Path(__file__).parents[3]

SMALL, WIDE = (80, 24), (120, 40)

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Terminal:
    """`planner tui` in a tmux server of its own, and what it shows."""

    def __init__(self, folder: Path, size: tuple[int, int], **variables: str) -> None:
        self.socket = f"planner-{uuid.uuid4().hex[:8]}"
        settings = {
            "XDG_CONFIG_HOME": str(folder), "PYTHONPATH": str(ROOT), "COLORTERM": "truecolor",
        } | variables  # fmt: skip
        pairs = [f"{name}={value}" for name, value in settings.items()]
        environment = [word for pair in pairs for word in ("-e", pair)]
        program = (sys.executable, "-m", "planner", "tui", "--gpu", "h100")
        self.tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", str(size[0]), "-y", str(size[1]),
            "-c", str(folder), *environment, *program, ";", "set-option", "remain-on-exit", "on",
        )  # fmt: skip

    def tmux(self, *words: str) -> str:
        """Run a command of tmux and return what it prints."""
        found = subprocess.run(
            ["tmux", "-L", self.socket, *words], check=True, capture_output=True, text=True,
            timeout=30, env={**os.environ, "TMUX": ""},
        )  # fmt: skip
        return found.stdout

    def press(self, *keys: str) -> None:
        """Press keys by name, each once the screen stands still: as fast as a person at most."""
        for key in keys:
            self.tmux("send-keys", key)
            self.settle()

    def settle(self) -> None:
        """Wait until the screen stands still; one that never does is left moving."""
        before = ""
        for _ in range(20):
            time.sleep(0.1)
            now = self.text()
            if now == before:
                return
            before = now

    def type(self, text: str) -> None:
        """Type letters."""
        self.tmux("send-keys", "-l", text)
        self.settle()

    def replace(self, text: str) -> None:
        """Type something instead of what the line says."""
        self.press("End", "C-u")
        self.type(text)

    def paste(self, text: str) -> None:
        """Paste as a terminal does."""
        self.tmux("set-buffer", "--", text, ";", "paste-buffer", "-p")

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the window."""
        self.tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def text(self) -> str:
        """Return the screen."""
        return self.tmux("capture-pane", "-p")

    def sees(self, *words: str, seconds: float = 90) -> str:
        """Wait until the screen shows all the words."""
        self.until(lambda: all(word in self.text() for word in words), seconds)
        return self.text()

    def pages_to(self, words: str, *, most: int = 12) -> None:
        """Go down page by page until the words are there."""
        for _ in range(most):
            if words in self.text():
                return
            self.press("PageDown")
            time.sleep(0.5)
        self.sees(words, seconds=1)

    def until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        """Wait until something holds; fail with the screen if it never does."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it did not happen:\n{self.text()}"
            time.sleep(0.1)

    def quit(self) -> int:
        """Leave the program and return its exit status."""
        self.press("C-q")
        self.until(lambda: bool(self._exit_status()))
        return int(self._exit_status())

    def _exit_status(self) -> str:
        # tmux sometimes misses that its program ended, until it sees another child end.
        self.tmux("run-shell", "-b", "true")
        return self.tmux("display", "-p", "#{pane_dead_status}").strip()

    def close(self) -> None:
        """End the tmux server."""
        self.tmux("kill-server")


Open = Callable[..., Terminal]


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def start(size: tuple[int, int], **variables: str) -> Terminal:
        opened.append(Terminal(tmp_path, size, **variables))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_plans_changes_a_knob_exports_and_quits(open_terminal: Open, tmp_path: Path) -> None:
    terminal = open_terminal(SMALL)
    terminal.sees("Recommended for goodput", "✓ P99 TTFT")
    terminal.pages_to("Changing one knob")
    terminal.press("F3")
    terminal.sees("P99 TTFT:")
    terminal.press("Left")
    terminal.sees("was fp8", "▼ highest rate under the SLO")
    terminal.press("v")
    terminal.sees("m: next metric")
    terminal.press("C-s")
    terminal.sees("plan-chat-h100_sxm")
    terminal.replace("exported-here")
    terminal.press("Enter")
    terminal.sees("Written to")
    plan = json.loads((tmp_path / "exported-here" / "plan.json").read_text())
    assert plan["recommended"]["config"]["quantization"] == "bf16"
    assert terminal.quit() == 0
    state = json.loads((tmp_path / "trtllm-planner" / "tui.json").read_text())
    assert state["screen"] == "what_if"


def test_measures_and_hands_the_run_on(open_terminal: Open) -> None:
    pytest.importorskip("transformers")
    terminal = open_terminal(WIDE)
    terminal.sees("Done:", "✓ P99 TTFT")
    terminal.press("F5")
    terminal.sees("[x] ")
    for text in ("", TINY["model"], TINY["workload"], TINY["settings"], "", "", "1"):
        if text:
            terminal.replace(text)
        terminal.press("Tab")
    terminal.press("Tab", "Tab", "Tab", "Space", "End", "Space")
    terminal.sees("[x] the backend's own defaults")
    terminal.press("C-r")
    terminal.sees("tokens", "/s", "left")
    terminal.sees("1 run is in planner-runs.db", "run 1")
    terminal.press("F7")
    terminal.sees("In force")
    terminal.press("Enter")
    terminal.sees("0 runs predicted, 1 skipped")
    assert terminal.quit() == 0


def test_a_storm_of_sizes_and_pastes_without_colours(open_terminal: Open) -> None:
    terminal = open_terminal(SMALL, NO_COLOR="1")
    terminal.sees("Searching")
    for turn in range(12):
        terminal.resize(50 + 11 * turn, 14 + 3 * turn)
        terminal.paste("paste [bold] ?\n" * 6)
    terminal.resize(*SMALL)
    terminal.sees("✗ Not searched: see GPU", "✗")
    terminal.replace("h100")
    terminal.sees("Recommended for goodput", "Done:")
    _has_no_hue(terminal.tmux("capture-pane", "-e", "-p"))
    assert terminal.quit() == 0


def _has_no_hue(drawn: str) -> None:
    """Check the colours of a screen that NO_COLOR is meant for."""
    colours = re.findall(r"[34]8;2;(\d+);(\d+);(\d+)", drawn)
    assert colours
    assert all(red == green == blue for red, green, blue in colours)
    named = re.sub(r"[34]8;2;\d+;\d+;\d+", "", drawn)
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[1-6]|4[1-6]|9[1-6]|10[1-6])[;m]", named)
