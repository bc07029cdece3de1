"""What a GPU has no table of, the nearest GPU that has one lends it.

Lenders' files are large, and most plans use what was measured on their own GPU: the files are
read when somebody asks for an operator that the GPU lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

from cost_models.gpu import GpuSpec
from cost_models.operators.fit import OperatorFit
from cost_models.operators.grid import ResidualGrid

Fits = Mapping[str, OperatorFit[Any]]
"""Of one family of operators, by dtype."""

Operators = Mapping[str, Fits]
"""By family."""

LENDERS: Mapping[str, tuple[str, ...]] = {
    "ampere": ("a100_sxm", "h200_sxm", "h100_sxm", "l40s", "b200_sxm"),
    "ada": ("l40s", "h100_sxm", "h200_sxm", "a100_sxm", "b200_sxm"),
    "hopper": ("h200_sxm", "h100_sxm", "l40s", "a100_sxm", "b200_sxm"),
    "blackwell": ("b200_sxm", "h200_sxm", "h100_sxm", "l40s", "a100_sxm"),
}
"""Whose fitted efficiencies a GPU borrows where it has no table of its own, nearest first."""

ARCHITECTURE_OF: Mapping[str, str] = {
    "a100_sxm": "ampere",
    "l40s": "ada",
    "h100_sxm": "hopper",
    "h200_sxm": "hopper",
    "b200_sxm": "blackwell",
}
"""Of each lender."""


class Lenders:
    """The GPUs that lend to one, as a single source.

    Args:
        gpu: Who borrows.
        read: Returns the operators that were fitted on a GPU.
    """

    def __init__(self, gpu: GpuSpec, read: Callable[[str], Operators]) -> None:
        self._gpu = gpu
        self._read = read

    @cached_property
    def operators(self) -> dict[str, dict[str, OperatorFit[Any]]]:
        """The nearest lender's fit of every family and dtype.

        A lender of the same architecture runs the same kernels and lends its residuals too.
        """
        found: dict[str, dict[str, OperatorFit[Any]]] = {}
        for lender in LENDERS[self._gpu.architecture]:
            if lender == self._gpu.name:
                continue
            akin = ARCHITECTURE_OF[lender] == self._gpu.architecture
            for family, fits in self._read(lender).items():
                known = found.setdefault(family, {})
                for dtype, fit in fits.items():
                    if dtype not in known:
                        known[dtype] = fit if akin else _without_residuals(fit)
        return found

    def fits(self, family: str) -> Fits:
        """Return what is lent of one family."""
        return self.operators.get(family, {})


class CompletedFits(Mapping[str, OperatorFit[Any]]):
    """The GPU's own fits of a family, and for every other dtype the lenders'."""

    def __init__(self, family: str, own: Fits, lenders: Lenders) -> None:
        self._family, self._own, self._lenders = family, own, lenders

    def __getitem__(self, dtype: str) -> OperatorFit[Any]:
        """Return the fit of a dtype."""
        own = self._own.get(dtype)
        return self._lenders.fits(self._family)[dtype] if own is None else own

    def __iter__(self) -> Iterator[str]:
        """Yield the dtypes, the GPU's own first."""
        return iter({**self._own, **self._lenders.fits(self._family)})

    def __len__(self) -> int:
        """Return how many dtypes there are."""
        return len({**self._own, **self._lenders.fits(self._family)})


class BorrowedNames(Set[str]):
    """`family/dtype` of all that is lent and not the GPU's own."""

    def __init__(self, own: Operators, lenders: Lenders) -> None:
        self._own, self._lenders = own, lenders

    def __contains__(self, name: object) -> bool:
        """Whether an operator is another GPU's; of the GPU's own no lender is asked."""
        family, _, dtype = str(name).partition("/")
        return dtype not in self._own.get(family, {}) and dtype in self._lenders.fits(family)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        for family, fits in self._lenders.operators.items():
            own = self._own.get(family, {})
            yield from (f"{family}/{dtype}" for dtype in fits if dtype not in own)

    def __len__(self) -> int:
        """Return how many are borrowed."""
        return sum(1 for _ in self)


def _without_residuals(fit: OperatorFit[Any]) -> OperatorFit[Any]:
    """Constants without the residuals, which belong to the chip they were seen on."""
    names = (field.name for field in fields(fit.params))
    grids = [name for name in names if isinstance(getattr(fit.params, name), ResidualGrid)]
    return replace(fit, params=replace(fit.params, **dict.fromkeys(grids)))
