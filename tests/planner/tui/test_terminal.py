"""End to end in a real pseudo-terminal: types as a person would and reads the screen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")
pyte = pytest.importorskip("pyte")

PROGRAM = "import sys; from planner.cli.main import main; sys.argv[0] = 'planner'; main()"


class Terminal:
    """A program in a pseudo-terminal of 100 x 30, and what it shows."""

    def __init__(self, folder: Path, **variables: str) -> None:
        environment = {
            "PATH": "/usr/bin:/bin", "TERM": "xterm-256color", "LANG": "C.UTF-8",
            "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "PYTHONPATH": str(_root()),
        } | variables  # fmt: skip
        self.screen = pyte.Screen(100, 30)
        self.stream = pyte.ByteStream(self.screen)
        self.child = pexpect.spawn(
            sys.executable,
            ["-c", PROGRAM, "tui", "--gpu", "h100"],
            dimensions=(30, 100),
            env=environment,
            cwd=str(folder),
        )
        self.raw = b""

    def text(self) -> str:
        """Read what came and return the screen."""
        try:
            while True:
                data = self.child.read_nonblocking(65536, timeout=0.05)
                self.raw += data
                # pyte knows no query of modes (CSI ? n $ p) and would show its letters.
                self.stream.feed(data)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return "\n".join(self.screen.display)

    def wait_for(self, words: str, seconds: float = 60) -> str:
        """Wait until the screen shows some words."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            text = self.text()
            if words in text:
                return text
        raise AssertionError(f"{words!r} did not come:\n{self.text()}")

    def send(self, keys: str) -> None:
        """Type."""
        self.child.send(keys)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.child.close(force=True)


F3, CTRL_S, CTRL_Q, CTRL_U = "\x1bOR", "\x13", "\x11", "\x15"


def test_plans_changes_a_knob_exports_and_quits(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("Recommended for goodput")
    terminal.send(F3)
    terminal.wait_for("no difference")
    terminal.send("\x1b[D")
    terminal.wait_for("was fp8")
    terminal.send(CTRL_S)
    terminal.wait_for("plan-chat-h100_sxm")
    terminal.send(CTRL_U)
    terminal.wait_for("folder    ")
    terminal.send("exported-here")
    terminal.wait_for("exported-here")
    terminal.send("\r")
    terminal.wait_for("Written to")
    plan = json.loads((tmp_path / "exported-here" / "plan.json").read_text())
    assert plan["recommended"]["config"]["quantization"] == "bf16"
    terminal.send(CTRL_Q)
    terminal.child.expect(pexpect.EOF, timeout=20)
    terminal.child.close()
    assert terminal.child.exitstatus == 0
    assert (tmp_path / "trtllm-planner" / "tui.json").is_file()


def test_no_color_is_readable_and_sends_no_hue(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, NO_COLOR="1")
    try:
        text = terminal.wait_for("Recommended for goodput")
        assert "GPU" in text
        colours = {cell.fg for row in terminal.screen.buffer.values() for cell in row.values()} - {
            "default"
        }
        assert all(c[0:2] == c[2:4] == c[4:6] for c in colours if len(c) == 6), colours
    finally:
        terminal.child.close(force=True)


def _root() -> Path:
    return Path(__file__).parents[3]
