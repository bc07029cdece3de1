"""Runs a server and ends all of it when the measuring process is gone, however it ended.

`python -m executor.guard COMMAND...` with a pipe as its standard input: the pipe breaks when
the process at its other end dies, also by `kill -9`, and no server is left holding a GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from executor.process_group import MARKER, end_all

SIGNAL_STATUS = 128
"""A shell's exit status of a process ended by signal n is 128 + n."""


def main() -> int:
    """Run the command and return its exit status."""
    # The server is ended through its marker; the guard stays to report how it ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)  # noqa: S603  our caller's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = server.wait()
    return status if status >= 0 else SIGNAL_STATUS - status


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    end_all(os.environ[MARKER])


if __name__ == "__main__":
    sys.exit(main())
