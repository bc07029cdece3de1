"""Where the bytes of one GPU go: a bar, and each part in GiB and percent."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from textual.widgets import Static

from cost_models.memory import MemoryPlan
from cost_models.units import GIB
from planner.tui.text import gib

PARTS = (
    ("weights", "weight_bytes_per_gpu", "W"),
    ("KV cache", "kv_cache_bytes_per_gpu", "K"),
    ("activations", "activation_bytes_per_gpu", "a"),
    ("runtime", "runtime_bytes_per_gpu", "r"),
    ("comms", "communication_bytes_per_gpu", "c"),
    ("graphs", "cuda_graph_bytes_per_gpu", "g"),
    ("free", "free_bytes_per_gpu", "·"),
)
"""(name, field of the memory plan, letter in the bar). Letters, so that no colour is needed."""

BAR_WIDTH = 44


class MemoryBar(Static):
    """The memory of one GPU under a configuration."""

    def show(self, memory: MemoryPlan) -> None:
        """Show a memory plan of one configuration."""
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        for justify in ("left", "left", "right", "right") * 2:
            table.add_column(justify=justify)
        cells = [_cells(memory, part) for part in PARTS]
        half = -(-len(cells) // 2)
        for row in range(half):
            right = cells[half + row] if half + row < len(cells) else ("", "", "", "")
            table.add_row(*cells[row], *right)
        grid = Table.grid()
        grid.add_row(Text(_heading(memory), style="bold"))
        grid.add_row(Text(bar_of(memory)))
        grid.add_row(table)
        grid.add_row(Text(_blocks(memory)))
        self.update(grid)


def bar_of(memory: MemoryPlan) -> str:
    """Return the bar: letters in proportion, in the order of the parts."""
    total = float(memory.total_bytes)
    bar, end = "", 0.0
    for _, field, letter in PARTS:
        end += max(float(getattr(memory, field)), 0.0)
        bar += letter * max(round(BAR_WIDTH * end / total) - len(bar), 0)
    return bar[:BAR_WIDTH]


def _cells(memory: MemoryPlan, part: tuple[str, str, str]) -> tuple[str, str, str, str]:
    name, field, letter = part
    size = float(getattr(memory, field))
    share = 100 * size / float(memory.total_bytes)
    return letter, name, f"{size / GIB:.2f}", f"{share:.1f}%"


def _heading(memory: MemoryPlan) -> str:
    heading = f"Memory of one GPU: {gib(float(memory.total_bytes))}; parts in GiB"
    if memory.fits:
        return heading
    return f"{heading}\n✗ DOES NOT FIT: {gib(float(memory.shortfall_bytes))} short"


def _blocks(memory: MemoryPlan) -> str:
    return (
        f"KV cache: {float(memory.kv_cache_blocks):,.0f} blocks, "
        f"{float(memory.kv_cache_tokens):,.0f} tokens,\n"
        f"{float(memory.max_sequences):,.0f} sequences of max_seq_len at once"
    )
