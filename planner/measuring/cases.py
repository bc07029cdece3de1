"""Turns what a person wants measured into cases: plans, workloads and models for the executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError, ProfileError
from cost_models.model import ModelSpec
from cost_models.profile_io import load_model, read_json_object, read_yaml_object
from engines.base import LaunchFiles
from engines.registry import DEFAULT_ENGINE, defaults_of, find_engine, is_engine
from executor.backend import Backend, Launch, ModelSource
from executor.case import Case
from executor.traffic import Traffic, protocol_of
from planner.knobs import apply_engine_settings
from planner.local_gpu import _gpu_name, local_gpu
from planner.measuring.predicted import prediction_of
from planner.measuring.request import MeasureRequest
from planner.search.objective import DECIDING, Deciding
from planner.workloads.change import changed_workload
from planner.workloads.demand import workload_demand
from planner.workloads.model import Workload
from planner.workloads.workload import load_workload

OPEN_LOOP_S = 60.0
"""Length of an open loop whose workload states no number of requests."""

REQUESTS_PER_CLIENT = 10
"""Requests of a closed loop whose workload states no number."""

FEWEST_REQUESTS, MOST_REQUESTS = 30, 2000
"""Bounds of the number of requests where nobody states one."""

UNDESCRIBED_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "transformers": {
        "max_batch_size": 256,
        "tokens_per_block": 256,
        "enable_chunked_prefill": True,
        "cuda_graph_padding": True,
    },
}
"""What an engine without a spec does when nobody says, from its `ContinuousBatchingConfig`."""


def backend_defaults(engine: str) -> Mapping[str, Any]:
    """Return what an engine does when nobody says."""
    return UNDESCRIBED_DEFAULTS.get(engine) or defaults_of(engine)


def cases_of(request: MeasureRequest, backend: Backend) -> list[Case]:
    """Return what is to be measured, most informative first.

    Raises:
        PlannerError: A file is wrong, or something is not named.
    """
    request = _as_planned(request)
    workload = changed_workload(
        load_workload(request.workload),
        rate_per_s=request.rate_per_s,
        isl=request.isl,
        osl=request.osl,
    )
    name = request.model or workload.model
    if not name:
        raise ConfigError(f"{request.workload} names no model", hint="give --model")
    spec = load_model(name)
    model = model_source(name, spec, random_weights=request.random_weights)
    traffic = traffic_of(workload, num_requests=request.num_requests, seed=request.seed)
    gpu = _gpu_name(request.gpu) if request.gpu else local_gpu()
    cases = []
    for config in _configs(request, backend, spec, workload):
        cases.append(
            Case(
                deployment=deployment_of(
                    config, model=model, spec=spec, request=request, engine=backend.engine
                ),
                traffic=traffic,
                gpu=gpu,
                predicted=prediction_of(
                    config,
                    gpu=gpu,
                    model=name,
                    traffic=traffic,
                    request=request,
                    engine=request.backend_options.get("engine", backend.engine),
                ),
            )
        )
    return cases


def _as_planned(request: MeasureRequest) -> MeasureRequest:
    """Return the request with workload and model of its plan, where it names none."""
    if request.workload:
        return request
    if not request.plan:
        raise ConfigError("the request names no workload", hint="give --workload")
    asked = asked_of_plan(Path(request.plan))
    model = request.model or str(asked.get("model", ""))
    return replace(request, workload=str(asked["workload"]), model=model)


def model_source(name: str, spec: ModelSpec, *, random_weights: bool = False) -> ModelSource:
    """Return where a model's files are; what has a config.json alone gets random weights."""
    path = Path(name)
    folder = path if path.is_dir() else None
    is_local = folder is not None or path.suffix == ".json"
    if not is_local:
        path = Path(str(files("profiles"))) / "models" / f"{spec.name}.json"
    config_path = path / "config.json" if folder else path
    has_weights = folder is not None and any(folder.glob("*.safetensors"))
    return ModelSource(
        name=str(Path(name).resolve()) if is_local else spec.hub_name,
        hub_name=spec.hub_name,
        hf_config=_hf_config(config_path),
        folder=folder.resolve() if folder and has_weights else None,
        has_random_weights=random_weights or (is_local and not has_weights),
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
    )


def _hf_config(path: Path) -> Mapping[str, Any]:
    """Return a model's config.json; shipped profiles hold it in a wrapper."""
    if not path.is_file():
        return {}
    data = read_json_object(path)
    config: Mapping[str, Any] = data.get("config", data)
    return config


def traffic_of(workload: Workload, *, num_requests: int = 0, seed: int = 0) -> Traffic:
    """Return a workload as requests, with the `workload` section of their run."""
    arrival = workload.arrival
    count = num_requests or _num_requests(workload)
    demand = workload_demand(workload, seed=seed, num_requests=count)
    isl, osl = demand.requests.isl, np.minimum(demand.requests.osl, workload.max_output_tokens)
    section: dict[str, Any] = {"protocol": str(arrival.protocol), "num_requests": len(isl)}
    if workload.shared_prefix_tokens:
        section["shared_prefix_tokens"] = workload.shared_prefix_tokens
    arrival_s: list[float] = []
    if section["protocol"] == "closed_loop":
        section["concurrency"] = arrival.concurrency
    elif section["protocol"] == "open_loop":
        arrival_s = demand.arrival_s.tolist()
        section |= {"arrival": arrival.process, "rate_per_s": round(arrival.rate_per_s, 6)}
        section |= {"burstiness": round(arrival.cv**-2, 6)} if arrival.cv != 1 else {}
    for name, lengths in (("isl", isl), ("osl", osl)):
        if len(set(lengths.tolist())) == 1:
            section[name] = int(lengths[0])
    return Traffic(
        isl=isl.tolist(),
        osl=osl.tolist(),
        protocol=protocol_of(section, arrival_s),
        workload=section,
        shared_prefix_tokens=workload.shared_prefix_tokens,
    )


def deployment_of(
    config: EngineConfig,
    *,
    model: ModelSource,
    spec: ModelSpec,
    request: MeasureRequest,
    engine: str,
) -> Launch:
    """Return what a backend is asked to bring up, with the files that its engine is given."""
    given = LaunchFiles()
    if is_engine(engine):
        given = find_engine(engine).launch_files(config, spec, request.backend_options)
    return Launch(
        model=model,
        config=config,
        workdir=Path(request.workdir).resolve(),
        options=request.backend_options,
        engine_options=given.options,
        build_script=given.build_script,
        draft=_draft_source(config, random_weights=model.has_random_weights),
    )


def _draft_source(config: EngineConfig, *, random_weights: bool) -> ModelSource | None:
    """Return where the files of a draft model are; None of schemes that have none of their own."""
    if config.decoding_type != "DraftTarget":
        return None
    name = config.speculative_model
    return model_source(name, load_model(name), random_weights=random_weights)


def _configs(
    request: MeasureRequest, backend: Backend, spec: ModelSpec, workload: Workload
) -> list[EngineConfig]:
    if request.configs:
        return [apply_engine_settings(config, request.settings) for config in request.configs]
    if request.plan:
        chosen = plan_configs(Path(request.plan), top=request.top)
        return [apply_engine_settings(config, request.settings) for config in chosen]
    config = EngineConfig(
        **backend_defaults(backend.engine),
        quantization=spec.checkpoint_quantization,
        max_seq_len=min(workload.max_seq_len, spec.max_position_embeddings),
    )
    if request.config:
        engine = find_engine(backend.engine if is_engine(backend.engine) else DEFAULT_ENGINE)
        config, _ = engine.read_options(read_yaml_object(Path(request.config)), config)
    return [apply_engine_settings(config, request.settings)]


def asked_of_plan(path: Path) -> Mapping[str, Any]:
    """Return what a plan.json was asked: GPU, workload, model, engine and SLO.

    Raises:
        ProfileError: Not a plan, or one that does not say.
    """
    asked = read_json_object(path).get("asked")
    if not isinstance(asked, Mapping) or not asked.get("workload"):
        raise ProfileError(
            f"{path}: names no workload", hint="give --workload, or make the plan anew"
        )
    return asked


def plan_configs(path: Path, *, top: int = 1) -> list[EngineConfig]:
    """Return the recommendation of a plan.json and the alternatives that may beat it.

    The alternatives come in the order of what they might still gain: the better end of their
    interval over the recommendation's value.

    Raises:
        ProfileError: Not a plan.
    """
    plan = read_json_object(path)
    try:
        deciding = DECIDING[plan["objective"]]
        best, others = plan["recommended"], list(plan["alternatives"])
        others.sort(key=lambda other: -_upside(other, best, deciding))
        return [_config_of_json(entry["config"]) for entry in [best, *others][:top]]
    except (KeyError, TypeError) as error:
        raise ProfileError(f"{path}: not a plan ({error!r})") from None


def _upside(other: Mapping[str, Any], best: Mapping[str, Any], deciding: Deciding) -> float:
    """Return by how much a candidate could beat the recommendation, as a ratio."""
    low, high = other["predicted"][deciding.metric]["interval_90"]
    reference = best["predicted"][deciding.metric]["value"]
    if deciding.sign < 0:
        return float(reference / low) if low else 0.0
    return float(high / reference) if reference else 0.0


def _config_of_json(values: Mapping[str, Any]) -> EngineConfig:
    if values.get("num_replicas", 1) != 1:
        raise ConfigError(
            f"the plan deploys {values['num_replicas']} servers, and one alone is measured here",
            hint="plan for one server's share of the load, with --pin num_servers=1",
        )
    known = {f.name for f in fields(EngineConfig)}
    return EngineConfig(**{name: value for name, value in values.items() if name in known})


def _num_requests(workload: Workload) -> int:
    arrival = workload.arrival
    if arrival.num_requests:
        return min(arrival.num_requests, MOST_REQUESTS)
    wanted = arrival.concurrency * REQUESTS_PER_CLIENT or int(arrival.rate_per_s * OPEN_LOOP_S)
    return min(max(wanted, FEWEST_REQUESTS), MOST_REQUESTS)
