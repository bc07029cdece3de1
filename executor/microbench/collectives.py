"""Collectives between processes, one for each GPU, as an engine runs them.

The processes of a group start once and stay: importing torch and bringing NCCL up takes seconds,
a collective microseconds.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from executor.microbench.timing import call_s

START_LIMIT_S = 90.0
"""Until all ranks have answered for the first time: imports, NCCL's set-up, a first collective."""

CALL_LIMIT_S = 20.0

END_LIMIT_S = 5.0


class RankGroup:
    """Processes that work together; used as a context.

    Args:
        num_ranks: Processes, on GPUs 0, 1, ... where the device is `cuda`.
        device: `cuda` (NCCL) or `cpu` (Gloo).
    """

    def __init__(self, num_ranks: int, device: str) -> None:
        self.num_ranks, self.device = num_ranks, device
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._broken = ""

    def __enter__(self) -> Self:
        """Start the processes; they meet at their first collective."""
        import torch.multiprocessing  # noqa: PLC0415

        context = torch.multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self.num_ranks, store, self.device, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes, by force where they do not end by themselves."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(0 if self._broken else END_LIMIT_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, rank by rank."""
        return tuple(process.pid for process in self._processes)

    def allreduce_s(self, elements: int, *, limit_s: float = CALL_LIMIT_S) -> float:
        """Return the time of an all-reduce of so many FP16 numbers: that of the slowest rank.

        Raises:
            RuntimeError: A rank failed, ended or did not answer; the group is then of no more use.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        try:
            for connection in self._connections:
                connection.send(elements)
            return max(self._answers(limit_s))
        except (RuntimeError, OSError, EOFError) as error:
            self._broken = str(error) or "a rank ended"
            raise RuntimeError(self._broken) from error

    def start(self) -> None:
        """Wait until every rank has done a first all-reduce.

        Raises:
            RuntimeError: As `allreduce_s`.
        """
        self.allreduce_s(1, limit_s=START_LIMIT_S)

    def _answers(self, limit_s: float) -> list[float]:
        seconds = []
        for rank, connection in enumerate(self._connections):
            if not wait([connection], limit_s):
                raise RuntimeError(f"rank {rank} of {self.num_ranks}: no answer in {limit_s:.0f} s")
            answer = connection.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"rank {rank} of {self.num_ranks}: {answer}")
            seconds.append(answer)
        return seconds


class RankGroups:
    """Groups by number of ranks, started when first asked for; used as a context."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._groups: dict[int, RankGroup] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every group, the others too where one fails to."""
        self._open.__exit__(kind, error, trace)

    def allreduce_s(self, num_ranks: int, elements: int) -> float:
        """Return the time of an all-reduce over so many GPUs.

        Raises:
            RuntimeError: As `RankGroup.allreduce_s`.
        """
        if num_ranks not in self._groups:
            group = self._open.enter_context(RankGroup(num_ranks, self.device))
            self._groups[num_ranks] = group
            group.start()
        return self._groups[num_ranks].allreduce_s(elements)


def _serve(rank: int, num_ranks: int, store: str, device: str, connection: Connection) -> None:
    """Time what is asked for until the other end is closed."""
    import torch.distributed  # noqa: PLC0415

    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=START_LIMIT_S),
    )
    try:
        while True:
            connection.send(_answer(rank, num_ranks, device, connection.recv()))
    except (EOFError, OSError):
        torch.distributed.destroy_process_group()


def _answer(rank: int, num_ranks: int, device: str, elements: int) -> float | str:
    try:
        return _allreduce_s(rank, num_ranks, device, elements)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _allreduce_s(rank: int, num_ranks: int, device: str, elements: int) -> float:
    """Check one all-reduce, then time it on zeros, which stay what they are."""
    import torch  # noqa: PLC0415

    message = torch.full((elements,), rank + 1.0, device=device, dtype=torch.float16)
    torch.distributed.all_reduce(message)
    if not bool((message == num_ranks * (num_ranks + 1) / 2).all()):
        raise RuntimeError(f"an all-reduce of {elements} numbers gave a wrong sum")
    message.zero_()
    return call_s(lambda: torch.distributed.all_reduce(message), device)
