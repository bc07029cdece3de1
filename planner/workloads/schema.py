"""The strict form of a workload file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cost_models.acceptance import Acceptance
from planner.workloads.model import LARGEST_TOKENS, Arrival, LengthDistribution, Workload, check_slo

Tokens = Annotated[float, Field(ge=1, le=LARGEST_TOKENS, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, le=10**9)]

NORMAL_KNOTS = 513
"""Points at which a log-normal's inverse CDF is tabulated."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FixedLength(_Strict):
    """Every request has the same length."""

    kind: Literal["fixed"]
    tokens: Tokens

    def distribution(self) -> LengthDistribution:
        """Return it as an inverse CDF."""
        return LengthDistribution(
            probabilities=np.array([0.0, 1.0]), tokens=np.array([self.tokens, self.tokens])
        )


class LognormalLength(_Strict):
    """The logarithm of the length is normal."""

    kind: Literal["lognormal"]
    median: Tokens
    sigma: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)]
    """Standard deviation of the logarithm."""
    minimum: Tokens = 1.0
    maximum: Tokens

    def distribution(self) -> LengthDistribution:
        """Return it as an inverse CDF, clipped to its limits."""
        from statistics import NormalDist  # noqa: PLC0415

        inner = np.linspace(0.0, 1.0, NORMAL_KNOTS)[1:-1]
        z = np.array([NormalDist().inv_cdf(p) for p in inner])
        tokens = np.clip(self.median * np.exp(self.sigma * z), self.minimum, self.maximum)
        return LengthDistribution(
            probabilities=np.concatenate([[0.0], inner, [1.0]]),
            tokens=np.concatenate([tokens[:1], tokens, tokens[-1:]]),
        )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum <= self.median <= self.maximum:
            raise ValueError("median must lie between minimum and maximum")
        return self


class QuantileLength(_Strict):
    """Lengths at given probabilities, linear between them."""

    kind: Literal["quantiles"]
    probabilities: Annotated[list[float], Field(min_length=2)]
    tokens: Annotated[list[Tokens], Field(min_length=2)]

    def distribution(self) -> LengthDistribution:
        """Return it as an inverse CDF."""
        return LengthDistribution(
            probabilities=np.array(self.probabilities), tokens=np.array(self.tokens)
        )

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        p, tokens = self.probabilities, self.tokens
        if len(p) != len(tokens):
            raise ValueError("probabilities and tokens must have one length")
        if p[0] != 0 or p[-1] != 1 or sorted(set(p)) != p:
            raise ValueError("probabilities must increase from 0 to 1")
        if sorted(tokens) != tokens:
            raise ValueError("tokens must not decrease")
        return self


class EmpiricalLength(_Strict):
    """Lengths that were seen."""

    kind: Literal["empirical"]
    tokens: Annotated[list[Tokens], Field(min_length=1)]

    def distribution(self) -> LengthDistribution:
        """Return it as an inverse CDF."""
        ordered = np.sort(np.array(self.tokens * 2 if len(self.tokens) == 1 else self.tokens))
        return LengthDistribution(probabilities=np.linspace(0.0, 1.0, len(ordered)), tokens=ordered)


def _plain_number(value: Any) -> Any:
    """A number alone is the length of every request."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "fixed", "tokens": value} if is_number else value


Length = Annotated[
    FixedLength | LognormalLength | QuantileLength | EmpiricalLength,
    Field(discriminator="kind"),
    BeforeValidator(_plain_number),
]


class ArrivalProfile(_Strict):
    """How requests come; which keys are needed depends on the process."""

    process: Literal["poisson", "gamma", "closed_loop", "offline", "trace"]
    rate_per_s: Rate | None = None
    cv: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    concurrency: Count | None = None
    num_requests: Count | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needs = {
            "poisson": {"rate_per_s"},
            "gamma": {"rate_per_s", "cv"},
            "closed_loop": {"concurrency"},
            "offline": {"num_requests"},
            "trace": {"file"},
        }[self.process]
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        missing = needs - given
        if missing:
            raise ValueError(f"process {self.process} needs {', '.join(sorted(missing))}")
        extra = given - needs - {"process", "num_requests"}
        if extra:
            raise ValueError(f"process {self.process} does not take {', '.join(sorted(extra))}")
        return self

    def arrival(self) -> Arrival:
        """Return it as the planner reads it."""
        return Arrival(
            process=self.process,
            rate_per_s=self.rate_per_s or 0.0,
            cv=self.cv or 1.0,
            concurrency=self.concurrency or 0,
            num_requests=self.num_requests or 0,
        )


DecodingType = Literal["NGram", "DraftTarget", "Eagle", "MTP", "Medusa"]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class AcceptanceProfile(_Strict):
    """How often drafts of this text are right, for one way to draft."""

    acceptance: Share | Annotated[list[Share], Field(min_length=1)]
    """Chance that a draft token is right where all before it are: one number, or by position."""
    draft_rate: Share = 1.0
    draft_tokens: Annotated[float, Field(ge=0, le=64, allow_inf_nan=False)] = 0.0

    def stated(self, name: str) -> Acceptance:
        """Return it as the cost models read it."""
        chances = self.acceptance if isinstance(self.acceptance, list) else [self.acceptance]
        return Acceptance(
            conditional=tuple(chances),
            draft_rate=self.draft_rate,
            draft_tokens=self.draft_tokens,
            source=f"stated by workload {name}",
        )


class WorkloadProfile(_Strict):
    """One workload file."""

    schema_version: Literal[1]
    name: str
    title: str = ""
    model: str = ""
    arrival: ArrivalProfile
    isl: Length | None = None
    osl: Length | None = None
    shared_prefix_tokens: Annotated[int, Field(ge=0, le=LARGEST_TOKENS)] = 0
    max_output_tokens: Annotated[int, Field(gt=0, le=LARGEST_TOKENS)] | None = None
    slo: dict[str, float] = {}
    speculation: dict[
        Literal["NGram", "DraftTarget", "Eagle", "MTP", "Medusa"], AcceptanceProfile
    ] = {}
    objective: Literal["goodput", "throughput", "latency", "cost"] = "goodput"
    source: str = ""

    @model_validator(mode="after")
    def _has_lengths(self) -> Self:
        if self.arrival.process != "trace" and (self.isl is None or self.osl is None):
            raise ValueError("isl and osl are needed unless the arrivals are a trace")
        return self

    def workload(self, path: Path, trace: Workload | None) -> Workload:
        """Return it as the planner reads it; a trace gives what the file leaves out."""
        isl = self.isl.distribution() if self.isl else trace.isl  # type: ignore[union-attr]
        osl = self.osl.distribution() if self.osl else trace.osl  # type: ignore[union-attr]
        values: dict[str, Any] = {
            "name": self.name,
            "title": self.title or self.name,
            "model": self.model,
            "arrival": trace.arrival if trace else self.arrival.arrival(),
            "isl": isl,
            "osl": osl,
            "shared_prefix_tokens": self.shared_prefix_tokens,
            "max_output_tokens": self.max_output_tokens or max(int(osl.quantile(0.99)), 1),
            "slo": check_slo(self.slo, str(path)),
            "acceptances": {
                kind: stated.stated(self.name) for kind, stated in self.speculation.items()
            },
            "objective": self.objective,
            "source": self.source,
            "trace": trace.trace if trace else None,
        }
        return Workload(**values)
