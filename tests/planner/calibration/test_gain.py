"""A fit is kept where left-out runs gain by it; else the priors stay, and it is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from engines.registry import engine_constants
from planner.calibration import runs as under_test
from planner.calibration.constants import Constant, shipped_priors
from planner.calibration.fit import Fit
from planner.calibration.runs import Checked, kept_where_it_gains

MEASURED = {"tpot_ms.mean": 10.0, "output_tok_per_s": 500.0, "ttft_ms.mean": 80.0}


@dataclass(frozen=True)
class StandInRun:
    """As much of a measured run as errors read."""

    measured: dict[str, float]


@dataclass(frozen=True)
class StandInRow:
    """A prediction that errs by the same share in every metric."""

    run: StandInRun
    error: float

    @property
    def predicted(self) -> dict[str, float]:
        return {name: value * (1 + self.error) for name, value in self.run.measured.items()}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return dict.fromkeys(self.run.measured, (0.0, 1e9))

    def scored(self) -> list[str]:
        return list(self.run.measured)


@pytest.fixture
def priors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Constant]:
    """The shipped constants, by which every run is predicted 10 % too high."""
    monkeypatch.setattr(under_test, "calibrated", lambda *_: None)
    monkeypatch.setattr(
        under_test, "predict_run_with", lambda run, _: StandInRow(run=run, error=0.1)
    )
    return shipped_priors(engine_constants("vllm"))


def fitted(errors: list[float]) -> Checked:
    """A fit that errs so much on each run when it is left out."""
    rows: Any = [StandInRow(run=StandInRun(MEASURED), error=error) for error in errors]
    return Checked(
        fit=Fit(values={"host_s": 1.0}, relative_errors={"host_s": 0.1}, not_told=()),
        left_out=tuple(rows), folds=tuple(map(str, range(len(rows)))), seconds={},
    )  # fmt: skip


def test_a_fit_that_predicts_what_it_did_not_see_is_kept(priors: dict[str, Constant]) -> None:
    checked = fitted([0.02, -0.04])
    kept, [line] = kept_where_it_gains(checked, priors)
    assert kept is checked
    assert "tpot_ms.mean 10.0 -> 3.0 %" in line
    assert line.endswith("the fit holds")


def test_chance_does_not_undo_a_fit(priors: dict[str, Constant]) -> None:
    checked = fitted([0.02, -0.3])
    kept, [line] = kept_where_it_gains(checked, priors)
    assert kept is checked
    assert line.endswith("no loss beyond chance, the fit holds")


def test_where_left_out_runs_lose_the_priors_stay(priors: dict[str, Constant]) -> None:
    kept, [line] = kept_where_it_gains(fitted([0.2, -0.3, 0.25]), priors)
    assert not kept.has_taught
    assert kept.fit.values["host_s"] == priors["host_s"].prior
    assert kept.fit.relative_errors["host_s"] == priors["host_s"].log_sd
    assert [cast("Any", row).error for row in kept.left_out] == [0.1, 0.1, 0.1]
    assert line.endswith("a loss, the priors stay")


def test_a_single_run_has_nothing_to_be_compared_with(priors: dict[str, Constant]) -> None:
    checked = fitted([])
    assert kept_where_it_gains(checked, priors) == (checked, [])
