"""What can be timed, and in which order: the point that teaches most per second comes next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

OVERHEAD_S = 0.02
"""What a point costs beside its kernels: allocation, capture, the first launches."""

TIMED_CALLS = 30
"""Calls of a kernel that one point takes, warm-up included."""

FIRST_DISTANCE = 1e3
"""Distance of every point from a family of which nothing is known."""

GEMM_SHAPES: Sequence[tuple[int, int]] = (
    (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1024, 4096), (128256, 4096),
    (8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672), (2048, 2048), (1536, 2048),
    (151936, 2048), (512, 512),
)  # fmt: skip
"""(n, k) of projections, gate-up and down layers and heads, from small models to large ones."""

HEADS: Sequence[tuple[int, int, int]] = (
    (32, 8, 128), (64, 8, 128), (32, 32, 128), (16, 2, 128), (8, 1, 128), (64, 8, 64), (4, 2, 64),
)  # fmt: skip
"""(query heads, KV heads, head size) of one rank."""

BLOCK_SIZES = (16, 32, 64, 128)

FP8_BLOCK_SIZES = (64,)
"""As in the published tables; `--techniques` compares the sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One kernel at one size."""

    family: str
    key: Mapping[str, int | str]
    """Columns of its row in the tables."""
    flop: float = 0.0
    bytes_moved: float = 0.0
    allocated_bytes: float = 0.0

    def distance(self, other: Point) -> float:
        """Return how different two points of a family are: doublings, and 2 for other kinds."""
        return math.sqrt(
            sum(_difference(value, other.key[name]) ** 2 for name, value in self.key.items())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Roughly how fast a device is: for ordering points and leaving out hopeless ones."""

    flop_per_s: float
    bytes_per_s: float
    memory_bytes: float
    longest_call_s: float
    """A kernel that takes longer teaches too little for its time."""

    def call_s(self, point: Point) -> float:
        """Return about how long one call takes."""
        return point.flop / self.flop_per_s + point.bytes_moved / self.bytes_per_s

    def cost_s(self, point: Point) -> float:
        """Return about how long it takes to time a point."""
        return OVERHEAD_S + TIMED_CALLS * self.call_s(point)

    def allows(self, point: Point) -> bool:
        """Return whether a point fits and is worth its time."""
        fits = point.allocated_bytes < 0.5 * self.memory_bytes
        return fits and self.call_s(point) < self.longest_call_s


@dataclass(slots=True)
class Schedule:
    """Gives points out until nobody asks any more; mutable, owned by one benchmark.

    Families take turns by the time that they have had. Within one, the next point is the one
    whose distance from all that are known is greatest for its cost.
    """

    points: Sequence[Point]
    speed: Speed
    _spent_s: dict[str, float] = field(default_factory=dict)
    _open: dict[str, dict[int, float]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Point]:
        """Yield every allowed point once, most informative first."""
        for index, point in enumerate(self.points):
            if self.speed.allows(point):
                self._open.setdefault(point.family, {})[index] = FIRST_DISTANCE
        self._spent_s = dict.fromkeys(self._open, 0.0)
        while self._open:
            family = min(self._open, key=lambda name: self._spent_s[name])
            yield self._take(family)

    def _take(self, family: str) -> Point:
        distances = self._open[family]
        best = max(distances, key=lambda i: distances[i] / self.speed.cost_s(self.points[i]))
        point = self.points[best]
        del distances[best]
        for index in distances:
            distances[index] = min(distances[index], point.distance(self.points[index]))
        if not distances:
            del self._open[family]
        self._spent_s[family] += self.speed.cost_s(point)
        return point


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a device can run."""

    dtypes: Sequence[str]
    """Of a GEMM."""
    triton: bool
    num_gpus: int = 0
    """GPUs of the host that can talk to each other."""


def calibration_points(abilities: Abilities) -> list[Point]:
    """Return everything from which a GPU is calibrated and that a device can time."""
    points = [*_gemm(abilities.dtypes), *_prefill()]
    points += _decode("attention_decode_contiguous", "bfloat16", (0,))
    if abilities.triton:
        points += _decode("attention_decode", "bfloat16", BLOCK_SIZES)
    if abilities.triton and "fp8" in abilities.dtypes:
        points += _decode("attention_decode", "fp8", FP8_BLOCK_SIZES)
    points += [*elementwise_points(fused=abilities.triton), *_bandwidth(), *_launch()]
    if abilities.num_gpus > 1:
        points += _allreduce(abilities.num_gpus)
    return points


def _gemm(dtypes: Sequence[str]) -> Iterator[Point]:
    for dtype, (n, k), m in product(dtypes, GEMM_SHAPES, _doublings(1, 16384)):
        yield gemm_point("gemm", dtype, (m, n, k))


def gemm_point(family: str, dtype: str, shape: tuple[int, int, int]) -> Point:
    """Return a GEMM of shape (m, n, k)."""
    m, n, k = shape
    size = 1 if dtype == "fp8" else 2
    moved = float(size * (m * k + n * k) + 2 * m * n)
    return Point(
        family=family,
        key={"dtype": dtype, "m": m, "n": n, "k": k},
        flop=2.0 * m * n * k / (2.0 if dtype == "fp8" else 1.0),
        bytes_moved=moved,
        allocated_bytes=moved,
    )


def _prefill() -> Iterator[Point]:
    for (heads, kv_heads, dim), batch, length in product(HEADS, (1, 4, 16), _doublings(64, 16384)):
        if batch * length > 65536:
            continue
        moved = float(2 * batch * length * dim * (2 * heads + 2 * kv_heads))
        yield Point(
            family="attention_context",
            key=_attention_key(heads, kv_heads, dim, batch) | {"seq_len": length},
            # Half of the square is masked.
            flop=2.0 * batch * heads * length * length * dim,
            bytes_moved=moved,
            allocated_bytes=2 * moved,
        )


def _decode(family: str, kv_dtype: str, block_sizes: Sequence[int]) -> Iterator[Point]:
    sizes = product(HEADS, (1, 4, 16, 64, 256), _doublings(64, 65536)[::2], block_sizes)
    for (heads, kv_heads, dim), batch, length, block_size in sizes:
        moved = float((2 if kv_dtype == "fp8" else 4) * batch * length * dim * kv_heads)
        key = _attention_key(heads, kv_heads, dim, batch)
        key |= {"kv_cache_dtype": kv_dtype, "kv_len": length}
        yield Point(
            family=family,
            key=key | ({"block_size": block_size} if block_size else {}),
            flop=4.0 * batch * heads * length * dim,
            bytes_moved=moved,
            allocated_bytes=3 * moved if kv_dtype == "fp8" else moved,
        )


def _attention_key(heads: int, kv_heads: int, dim: int, batch: int) -> dict[str, int | str]:
    return {
        "attn_dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "window_size": 0,
        "batch_size": batch,
    }


def elementwise_points(*, fused: bool) -> Iterator[Point]:
    """Yield norm with residual and SwiGLU, by operators one by one and, where it can be, fused."""
    kinds = ("norm_residual", "swiglu")
    forms = ("unfused", "fused") if fused else ("unfused",)
    for kind, form, tokens, width in product(
        kinds, forms, _doublings(1, 16384)[::2], (2048, 4096, 8192, 14336)
    ):
        moved = float(2 * tokens * width * 4)
        yield Point(
            family="elementwise",
            key={"op": kind, "form": form, "num_tokens": tokens, "width": width},
            bytes_moved=moved,
            allocated_bytes=2 * moved,
        )


def _bandwidth() -> Iterator[Point]:
    for op, size in product(("copy", "read"), _doublings(1 << 20, 1 << 32)[::2]):
        moved = float(size * (2 if op == "copy" else 1))
        yield Point(
            family="bandwidth",
            key={"op": op, "num_bytes": size},
            bytes_moved=moved,
            allocated_bytes=2.0 * size,
        )


def _launch() -> Iterator[Point]:
    for op, kernels in product(("eager", "graph"), (1, 10, 100)):
        yield Point(family="launch", key={"op": op, "num_kernels": kernels})


def _allreduce(num_gpus: int) -> Iterator[Point]:
    for ranks, elements in product(_doublings(2, num_gpus), _doublings(1 << 10, 1 << 26)):
        yield Point(
            family="nccl",
            key={
                "collective": "all_reduce",
                "dtype": "half",
                "num_gpus": ranks,
                "message_elements": elements,
                "message_bytes": 2 * elements,
            },
            bytes_moved=4.0 * elements,
            allocated_bytes=4.0 * elements,
        )


def _doublings(first: int, last: int) -> list[int]:
    return [first << step for step in range((last // first).bit_length())]


def _difference(one: int | str, other: int | str) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return 0.0 if one == other else 2.0
    return abs(math.log2(one or 1) - math.log2(other or 1))
