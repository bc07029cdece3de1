"""Benchmarks: run as modules, they print figures and check nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable

from planner.cli.main import end_without_reader


def run_bench(main: Callable[[], None]) -> None:
    """Run a benchmark whose output may go to a program that stops reading, as `head` does."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        end_without_reader()
