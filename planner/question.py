"""The question of a user: what is to be served, on what, within which limits; all loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cost_models.cluster import Cluster
from cost_models.deployment import DEPLOYMENT_KNOBS, Deployment
from cost_models.engine import EngineConfig
from cost_models.engine_rules import EngineRules, Violation
from cost_models.errors import ConfigError
from cost_models.gpu import GpuSpec
from cost_models.model import ModelSpec
from cost_models.precision import kv_dtype, quantization
from cost_models.profile_io import load_gpu, load_model
from cost_models.weights import check_divides
from engines.registry import defaults_of, find_engine, load_calibration
from planner.knobs import apply_settings, parse_limits
from planner.local_gpu import _detected_gpu
from planner.own_calibrations import files_in_force
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import Prediction, predict_deployment
from planner.quality.files import load_quality
from planner.search.space import DRAFTS, OUTER_KNOBS, SearchSpace
from planner.search.study import Candidate
from planner.workloads.change import changed_workload
from planner.workloads.demand import Demand, workload_demand
from planner.workloads.model import OBJECTIVES, Workload, check_slo
from planner.workloads.workload import load_workload

MAX_GPUS = 8
"""One node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is to be served, on what, with which engine; everything loaded and checked."""

    gpu: GpuSpec
    model: ModelSpec
    workload: Workload
    rules: EngineRules
    evaluator: Evaluator
    slo: Mapping[str, float]

    @property
    def default_config(self) -> EngineConfig:
        """The engine's own defaults for this model, as its server starts without options."""
        own = self.model.checkpoint_quantization
        return EngineConfig(
            **defaults_of(self.rules.name),
            quantization=own,
            moe_backend=self.rules.moe_backend(own, self.gpu),
            max_seq_len=self.workload.max_seq_len,
        )

    @property
    def default_deployment(self) -> Deployment:
        """One server with the engine's own defaults."""
        return self.deployment_of(self.default_config)

    def deployment_of(self, config: EngineConfig, *, num_servers: int = 1) -> Deployment:
        """Return like servers of a configuration, on as many GPUs as they take."""
        num_gpus = config.num_gpus * num_servers
        cluster = Cluster(gpu=self.gpu, num_gpus=num_gpus)
        return Deployment.of(config, cluster, num_servers=num_servers)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything that `plan` can be told."""

    gpu: str
    workload: str
    model: str = ""
    engine: str = "trtllm"
    num_gpus: int = 1
    """GPUs at hand: the plan takes as few of them as meet the SLO at the offered load."""
    use_all: bool = False
    """Take all of them."""
    slo: Mapping[str, float] = field(default_factory=dict)
    risk: float = 0.0
    """The SLO must hold at the upper end of the interval of 1 - risk; 0 is the value itself."""
    objective: str = ""
    pins: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    trials: int = 120
    time_budget_s: float = 10.0
    seed: int = 0
    storage: str = ""
    calibration: str = ""
    usd_per_hour: float | None = None
    scheduling: bool = False
    """Simulate other orders of the waiting queue however long that takes."""
    max_quality_loss_pct: float | None = None
    """Expected loss of quality beside the published checkpoint; None is no limit."""
    progress: Callable[[int, int], None] | None = None
    on_best: Callable[[Candidate], None] | None = None
    stopped: Callable[[], bool] | None = None


def load_problem(  # noqa: PLR0913  one argument for each thing a user names
    *,
    gpu: str,
    workload: str,
    model: str = "",
    engine: str = "trtllm",
    slo: Mapping[str, float] | None = None,
    risk: float = 0.0,
    calibration: str = "",
    usd_per_hour: float | None = None,
    max_quality_loss_pct: float | None = None,
) -> Problem:
    """Load and check what a question is about.

    Args:
        gpu: Profile name, alias, YAML file, or `auto`.
        workload: Shipped name, or a file.
        model: Overrides the workload's.
        engine: Name, see `engines.registry`.
        slo: Limits that replace or join the workload's.
        risk: See `PlanRequest`.
        calibration: A file, `shipped`, or empty for the user's own where there is one.
        usd_per_hour: Price of one GPU.
        max_quality_loss_pct: See `PlanRequest`.

    Raises:
        PlannerError: A profile is unknown or damaged, or no model is named.
    """
    spec = load_gpu(_detected_gpu() if gpu == "auto" else gpu)
    if usd_per_hour is not None:
        spec = replace(spec, usd_per_hour=usd_per_hour)
    work = load_workload(workload)
    if not 0 <= risk < 1:
        raise ConfigError(f"risk {risk} is not from 0 to below 1", hint="for example 0.1")
    name = model or work.model
    if not name:
        raise ConfigError(f"{workload} names no model", hint="give --model")
    shape = load_model(name)
    limits = dict(work.slo) | check_slo(slo or {}, "--slo")
    own = files_in_force(calibration, gpu=spec.name, engine=engine)
    calibrated = load_calibration(spec, engine, own)
    return Problem(
        gpu=spec,
        model=shape,
        workload=work,
        rules=find_engine(engine).rules,
        slo=limits,
        evaluator=Evaluator(
            model=shape,
            gpu=spec,
            calibration=calibrated,
            load=work.load(),
            slo=limits,
            risk=risk,
            quality=load_quality(shape, calibration),
            max_quality_loss_pct=max_quality_loss_pct,
        ),
    )


def requested_problem(request: PlanRequest) -> Problem:
    """Load and check what a plan is asked for.

    Raises:
        PlannerError: A profile is unknown or damaged, or no model is named.
    """
    return load_problem(
        gpu=request.gpu,
        workload=request.workload,
        model=request.model,
        engine=request.engine,
        slo=request.slo,
        risk=request.risk,
        calibration=request.calibration,
        usd_per_hour=request.usd_per_hour,
        max_quality_loss_pct=request.max_quality_loss_pct,
    )


def search_space(problem: Problem, request: PlanRequest) -> SearchSpace:
    """Return what `plan` may choose from.

    Raises:
        ConfigError: Nothing is left to choose from.
    """
    if not 1 <= request.num_gpus <= MAX_GPUS:
        raise ConfigError(f"--num-gpus {request.num_gpus}", hint=f"accepted: 1 to {MAX_GPUS}")
    limits = parse_limits(request.pins, request.limits)
    base = replace(problem.default_config, cuda_graph_padding=True, enable_block_reuse=True)
    single = {k: v[0] for k, v in limits.items() if len(v) == 1}
    base = replace(base, **{k: v for k, v in single.items() if k not in DEPLOYMENT_KNOBS})
    if base.decoding_type:
        base = replace(base, **_unstated_drafting(problem, base.decoding_type, limits))
    if "max_batch_size" not in limits:
        base = replace(base, max_batch_size=min(base.max_batch_size, base.max_num_tokens))
    deployment = Deployment.of(base, Cluster(gpu=problem.gpu, num_gpus=request.num_gpus))
    space = SearchSpace(
        model=problem.model,
        rules=problem.rules,
        base=deployment.with_knobs(router=single.get("router", deployment.router)),
        limits=limits,
        use_all=request.use_all,
    )
    if not any(True for _ in space.splits()):
        raise ConfigError(_why_empty(problem, space))
    return space


def _unstated_drafting(
    problem: Problem, decoding_type: str, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a pinned way to draft leaves open: the middle length, and a known draft."""
    rule = problem.rules.speculation.get(decoding_type)
    if rule is None:
        return {}
    found: dict[str, Any] = {"max_draft_len": rule.searched[len(rule.searched) // 2]}
    if decoding_type == "DraftTarget":
        found["speculative_model"] = DRAFTS.get(problem.model.name, "")
    return {knob: value for knob, value in found.items() if knob not in limits}


def predict(  # noqa: PLR0913  one argument for each thing a user names
    *,
    gpu: str,
    workload: str,
    model: str = "",
    engine: str = "trtllm",
    settings: Mapping[str, str] | None = None,
    config: EngineConfig | None = None,
    slo: Mapping[str, float] | None = None,
    calibration: str = "",
    seed: int = 0,
) -> Prediction:
    """Return what a configuration would do; without one, what the engine's defaults would.

    The workload's requests are drawn with `seed` and simulated one by one.

    Raises:
        PlannerError: Bad input; a configuration that does not fit is an answer.
    """
    problem = load_problem(
        gpu=gpu, workload=workload, model=model, engine=engine, slo=slo, calibration=calibration
    )
    demand = workload_demand(problem.workload, seed=seed)
    chosen = problem.deployment_of(config or problem.default_config)
    return predict_problem(problem, chosen, settings or {}, demand=demand)[0]


def predict_problem(
    problem: Problem,
    deployment: Deployment,
    settings: Mapping[str, str],
    *,
    demand: Demand | None = None,
) -> tuple[Prediction, list[Violation]]:
    """Return the prediction of a deployment, and why the engine could not deploy it.

    Without a demand to simulate, latencies and rates come from the closed form.

    Raises:
        ConfigError: A knob has a value that cannot be computed.
    """
    chosen = apply_settings(deployment, settings)
    violations = check_runnable(problem, chosen.config)
    return predict_deployment(problem.evaluator, chosen, demand), violations


def check_runnable(problem: Problem, config: EngineConfig) -> list[Violation]:
    """Return why the engine cannot deploy a configuration, once it can at least be computed.

    Raises:
        ConfigError: A precision that the GPU lacks or no table knows, or parallel sizes
            that do not divide the model.
    """
    check_divides(problem.model, config)
    quantization(config.quantization)
    kv_dtype(config.kv_cache_dtype)
    found = problem.rules.violations(config, model=problem.model, gpu=problem.gpu)
    for violation in found:
        lacking = violation.knob in ("quantization", "kv_cache_dtype")
        if lacking and "cannot run it" in violation.reason:
            raise ConfigError(str(violation))
    return found


def _objective(name: str) -> str:
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown", hint=f"known: {', '.join(OBJECTIVES)}")
    return name


def _why_empty(problem: Problem, space: SearchSpace) -> str:
    """Name the knob that leaves nothing deployable."""
    values = {k: v[0] for k, v in space.limits.items() if k in OUTER_KNOBS}
    first = replace(space.base.config, **{k: v for k, v in values.items() if k in OUTER_KNOBS})
    if first.num_gpus > space.num_gpus:
        return (
            f"the pinned parallel sizes need {first.num_gpus} GPUs, --num-gpus is {space.num_gpus}"
        )
    found = problem.rules.violations(first, model=problem.model, gpu=problem.gpu)
    if found:
        return str(found[0])
    return f"{problem.rules.title} cannot run {problem.model.name} on {problem.gpu.title}"


def changed_load(
    problem: Problem,
    *,
    rate_per_s: float | None = None,
    isl: float | None = None,
    osl: float | None = None,
) -> Problem:
    """Return the problem under another load; distributions are stretched to the new mean.

    Args:
        problem: What is loaded.
        rate_per_s: Requests per second; None keeps the workload's.
        isl: Mean prompt length in tokens; None keeps the workload's.
        osl: Mean output length in tokens; None keeps the workload's.

    Raises:
        ConfigError: A value that no load can have, or a rate where clients set the pace.
    """
    workload = changed_workload(problem.workload, rate_per_s=rate_per_s, isl=isl, osl=osl)
    if workload is problem.workload:
        return problem
    known = problem.evaluator
    evaluator = Evaluator(
        model=known.model,
        gpu=known.gpu,
        calibration=known.calibration,
        load=workload.load(),
        slo=known.slo,
        risk=known.risk,
        quality=known.quality,
        max_quality_loss_pct=known.max_quality_loss_pct,
    )
    return replace(problem, workload=workload, evaluator=evaluator)
