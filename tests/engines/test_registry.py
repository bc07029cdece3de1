"""Engines are found by name, and another package can add one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cost_models.engine import EngineConfig
from cost_models.engine_profile_io import newest_profile
from cost_models.errors import ConfigError, ProfileError
from engines.base import SHIPPED_CONSTANTS, SHIPPED_PROFILES
from engines.registry import as_run, defaults_of, find_engine, list_engines

ROOT = Path(__file__).parents[2]

ACME = '''
"""A made-up engine: whole GPUs, graphs of three sizes, options in capitals."""

from dataclasses import replace
from pathlib import Path

from cost_models.engine_traits import EngineTraits
from cost_models.errors import ConfigError
from engines.base import EngineSpec

NAMES = {"BATCH": "max_batch_size", "BUDGET": "max_num_tokens", "SHARE": "gpu_memory_utilization"}


def options(config, model):
    return {name: getattr(config, knob) for name, knob in NAMES.items()}


def read_options(options, base):
    unknown = set(options) - set(NAMES)
    if unknown:
        raise ConfigError(f"acme has no option {min(unknown)}", hint=f"known: {', '.join(NAMES)}")
    return replace(base, **{NAMES[name]: value for name, value in options.items()}), []


def captured(config):
    return tuple(size for size in (1, 16, 64) if size <= config.cuda_graph_max_batch_size)


SPEC = EngineSpec(
    traits=EngineTraits(
        name="acme",
        memory_knob="gpu_memory_utilization",
        takes_share_of_whole_gpu=True,
        captured_batch_sizes=captured,
        largest_graph_tokens=lambda config: max(captured(config), default=0),
        captured_pieces=lambda config: (),
        pads_drafts=False,
        chunk_unit=lambda config: 8,
        reuses_partial_blocks=False,
        knows_block_size_effect=True,
    ),
    profiles=Path(__file__).parent,
    constants=Path(__file__).parent / "constants.json",
    defaults={
        "max_batch_size": 48,
        "enable_chunked_prefill": True,
        "cuda_graph_padding": True,
        "capacity_scheduler_policy": "RECOMPUTE",
    },
    options=options,
    read_options=read_options,
    option_names={knob: name for name, knob in NAMES.items()},
    plan_file_names=("acme.txt",),
    plan_files=lambda deployment, model, load: {
        "acme.txt": f"BATCH={deployment.config.max_batch_size}"
    },
)
'''


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """An installed package that adds an engine, and nothing else."""
    package, metadata = tmp_path / "acme_engine", tmp_path / "acme_engine-1.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(ACME)
    profile = newest_profile(SHIPPED_PROFILES, "vllm").read_text()
    for version in ("1.9", "1.10"):
        text = profile.replace("name: vllm", "name: acme").replace("vLLM 0.25", f"Acme {version}")
        (package / f"acme-{version}.yaml").write_text(text)
    constants = json.loads((SHIPPED_CONSTANTS / "vllm.json").read_text())
    (package / "constants.json").write_text(json.dumps(constants | {"engine": "acme"}))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-engine\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[planner.engines]\nacme = acme_engine:SPEC\n")
    return tmp_path


def planner(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, "-m", "planner", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "HOME": str(folder)},
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_an_engine_of_another_package_plans_and_predicts(acme: Path) -> None:
    question = ("--gpu", "h100", "--workload", "chat", "--engine", "acme")
    planned = planner(acme, "plan", *question, "--trials", "0", "--json", "--out", "plan")
    assert planned.returncode in (0, 1), planned.stderr
    assert json.loads(planned.stdout)["asked"]["engine"] == "acme"
    assert {path.name for path in (acme / "plan").iterdir()} == {"plan.json", "acme.txt"}

    predicted = planner(acme, "predict", *question, "--json")
    assert predicted.returncode in (0, 1), predicted.stderr
    own = json.loads(predicted.stdout)
    assert own["config"]["max_batch_size"] == 48
    assert "gpu_memory_utilization" in planner(acme, "predict", *question).stdout
    # Its share is of the whole GPU, and TensorRT-LLM's knob does nothing here.
    smaller = planner(acme, "predict", *question, "--json", "--set", "gpu_memory_utilization=0.5")
    tokens = [
        json.loads(result.stdout)["predicted"]["kv_cache_tokens"]["value"]
        for result in (predicted, smaller)
    ]
    assert tokens[1] < 0.7 * tokens[0]


def test_an_engine_of_another_package_reads_its_own_options(acme: Path) -> None:
    question = ("--gpu", "h100", "--workload", "chat", "--engine", "acme")
    (acme / "own.yaml").write_text("BATCH: 24\nSHARE: 0.8\n")
    read = planner(acme, "predict", *question, "--config", "own.yaml", "--json")
    config = json.loads(read.stdout)["config"]
    assert (config["max_batch_size"], config["gpu_memory_utilization"]) == (24, 0.8)

    (acme / "other.yaml").write_text("kv_cache_config: {free_gpu_memory_fraction: 0.8}\n")
    refused = planner(acme, "predict", *question, "--config", "other.yaml")
    assert refused.returncode == 2
    assert "acme has no option kv_cache_config" in refused.stderr
    (acme / "title.py").write_text(
        "from engines.registry import find_engine\nprint(find_engine('acme').rules.title)\n"
    )
    title = subprocess.run(
        [sys.executable, "title.py"], cwd=acme, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(acme)])},
    )  # fmt: skip
    assert title.stdout.strip() == "Acme 1.10"


def test_an_engine_that_nobody_described_is_refused(acme: Path) -> None:
    refused = planner(acme, "predict", "--gpu", "h100", "--workload", "chat", "--engine", "acne")
    assert refused.returncode == 2
    assert "engine 'acne' is unknown" in refused.stderr
    assert "acme, trtllm, vllm" in refused.stderr


def test_a_package_that_holds_no_engine_is_refused(
    acme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = acme / "acme_engine-1.dist-info" / "entry_points.txt"
    points.write_text(
        "[planner.engines]\nbroken = acme_engine:NAMES\nabsent = acme_nothing:SPEC\n"
        "other = acme_engine:SPEC\n"
    )
    monkeypatch.syspath_prepend(str(acme))
    assert {"broken", "absent", "other"} <= set(list_engines())
    for name, message in (
        ("broken", "is not its EngineSpec"),
        ("absent", "cannot be loaded"),
        ("other", "is not its EngineSpec"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_engine(name)


@pytest.mark.parametrize(
    ("versions", "newest"),
    [
        (("1.9", "1.10"), "1.10"),
        (("0.25", "0.9", "0.25.1"), "0.25.1"),
        (("1.2rc3", "1.2"), "1.2"),
        (("2.0", "10.0"), "10.0"),
    ],
)
def test_the_newest_profile_is_that_of_the_highest_version(
    versions: tuple[str, ...], newest: str, tmp_path: Path
) -> None:
    for version in versions:
        (tmp_path / f"x-{version}.yaml").touch()
    (tmp_path / "x-large-99.0.yaml").touch()
    assert newest_profile(tmp_path, "x").name == f"x-{newest}.yaml"


def test_a_profile_without_a_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no profile"):
        newest_profile(tmp_path, "x")
    (tmp_path / "x-1.two.yaml").touch()
    with pytest.raises(ProfileError, match="not a version"):
        newest_profile(tmp_path, "x")


def test_nothing_is_made_up_for_an_engine_without_a_spec() -> None:
    assert defaults_of("transformers") == {}
    trtllm = find_engine("trtllm")
    assert trtllm.defaults == {}
    config = EngineConfig(quantization="fp8")
    assert as_run(config, "transformers") == config
    assert as_run(config, "vllm").quantization == "fp8_dynamic"
