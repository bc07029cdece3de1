"""Quantized checkpoints and their quality, with a small model that was really trained."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cost_models.errors import PlannerError
from cost_models.precision import QUANTIZATIONS
from executor.models import load_model, load_tokenizer
from executor.quality.checkpoint import load, unpack_awq, unpack_fp8, unpack_nvfp4
from executor.quality.judge import QualityReport, QualityRequest, judge
from executor.quality.kv_cache import new_cache
from executor.quantization import modelopt
from executor.quantization.calibration import CalibrationSize, token_batches
from executor.quantization.quantize import Quantized, QuantizeRequest, quantize
from executor.quantization.schemes import SCHEMES, Form
from executor.texts import read_texts
from tests.small_model import add_outlier_channels, tiny_model, write_documents

CALIBRATION = CalibrationSize(num_samples=16, max_tokens=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """A trained model, texts, and the checkpoints made of it so far."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def request(self, name: str, **changes: Any) -> QuantizeRequest:
        request = QuantizeRequest(
            model=self.model,
            scheme=name,
            calibration_data=self.folder / "calibration.jsonl",
            out=self.folder / name,
            size=CALIBRATION,
            device="cpu",
        )
        return replace(request, **changes)

    def made(self, scheme: str) -> Path:
        """The folder of a scheme; FP8 carries FP8 KV scales."""
        folder = self.folder / scheme
        if not folder.exists():
            kv = "fp8" if scheme in ("fp8", "fp8_block", "int8_wo") else "bf16"
            quantize(self.request(scheme, kv_cache_dtype=kv))
        return folder

    def judged(self, model: Path, **changes: Any) -> QualityReport:
        request = QualityRequest(
            model=model,
            against=self.model,
            data=self.folder / "held_out.jsonl",
            max_documents=8,
            max_tokens=128,
            new_tokens=0,
            device="cpu",
        )
        return judge(replace(request, **changes))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    # One thread: on a shared machine a second one only waits for the first.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shop = Workshop(folder=tmp_path_factory.mktemp("workshop"))
    texts = tiny_model(shop.model).train
    add_outlier_channels(shop.model)
    write_documents(texts[::2], shop.folder / "calibration.jsonl")
    write_documents(texts[1::2], shop.folder / "held_out.jsonl")
    yield shop
    torch.set_num_threads(threads)


def logits(model: Any, tokens: Any, **arguments: Any) -> Any:
    with torch.inference_mode():
        return model(tokens, use_cache=bool(arguments), **arguments).logits.float()


def some_tokens(shop: Workshop) -> Any:
    text = read_texts(shop.folder / "held_out.jsonl")[0]
    ids = AutoTokenizer.from_pretrained(shop.model)(text)["input_ids"]
    return torch.tensor([ids[:96]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_smaller_and_close(shop: Workshop, scheme: str) -> None:
    folder = shop.made(scheme)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weights < 0.9 * sum(p.stat().st_size for p in shop.model.glob("*.safetensors"))
    found = shop.judged(folder).estimates
    # A wrong nibble, scale or sign makes noise of a model: KL would be of the order of nats.
    assert 0 < found["kl_nats_per_token"].value < 0.05
    assert found["top1_agreement_pct"].value > 70


def tensors_of(folder: Path, layer: str) -> dict[str, Any]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118
        return {name.rpartition(".")[2]: file.get_tensor(name) for name in names}


def test_int4_is_read_as_modelopt_packs_it() -> None:
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8  # noqa: PLC0415  it warns

    values = torch.randint(-8, 8, (32, 256), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(32, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    weight = values * scale.repeat_interleave(128, dim=1)
    packed = pack_int4_in_uint8(weight, scale, 128)
    assert torch.equal(unpack_awq({"weight": packed, "weight_scale": scale}).weight, weight)


def test_nvfp4_is_read_as_modelopt_reads_it(shop: Workshop) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor  # noqa: PLC0415  it warns

    found = tensors_of(shop.made("nvfp4"), "model.layers.0.mlp.down_proj")
    theirs = NVFP4QTensor((128, 256), torch.float32, found["weight"]).dequantize(
        torch.float32,
        scale=found["weight_scale"],
        double_scale=found["weight_scale_2"],
        block_sizes={-1: 16},
    )
    assert torch.allclose(unpack_nvfp4(found).weight, theirs)


def test_fp8_is_as_modelopt_simulates_it(shop: Workshop) -> None:
    """Weights and activations: ModelOpt's simulation is an independent reader of its files."""
    model = load_model(shop.model, "cpu")
    texts = read_texts(shop.folder / "calibration.jsonl")
    batches = token_batches(texts, load_tokenizer(shop.model), CALIBRATION)
    modelopt.calibrate(model, SCHEMES["fp8"], "bf16", batches)
    simulated = model.get_submodule("model.layers.0.self_attn.o_proj")
    read = unpack_fp8(tensors_of(shop.made("fp8"), "model.layers.0.self_attn.o_proj"))
    assert read.rounding is not None
    values = simulated.input_quantizer.amax.float() * torch.linspace(-1.2, 1.2, 999)
    for ours, theirs in (
        (read.weight, simulated.weight_quantizer(simulated.weight.float())),
        (read.rounding(values), simulated.input_quantizer(values)),
    ):
        # Near a tie the two may round differently, by a step of up to 1/14 of the largest value:
        # they divide in different precisions.
        assert (ours - theirs).abs().max() < theirs.abs().max() / 13
        assert ((ours - theirs).abs() < 1e-3 * theirs.abs().max()).float().mean() > 0.9


@pytest.mark.parametrize("scheme", ["int8_wo", "int4_gptq", "int4_rtn", "int8_sq"])
def test_transformers_loads_compressed_tensors_as_we_do(shop: Workshop, scheme: str) -> None:
    """compressed-tensors' own decompression is an independent reader of what we packed."""
    folder = shop.made(scheme)
    tokens = some_tokens(shop)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = load(folder, "cpu")
    cache = new_cache(ours.model, "bf16", ours.kv_scales)
    difference = (logits(theirs, tokens) - logits(ours.model, tokens, **cache)).abs()
    assert difference.mean() < 0.02


def test_awq_loses_less_than_plain_rounding(shop: Workshop) -> None:
    awq, rounded = (shop.judged(shop.made(name)).estimates for name in ("int4_awq", "int4_rtn"))
    assert awq["kl_nats_per_token"].value < rounded["kl_nats_per_token"].value


def test_a_model_has_lost_nothing_beside_itself(shop: Workshop) -> None:
    found = shop.judged(shop.model, new_tokens=4, prompt_tokens=16, generations=4).estimates
    none = {"perplexity_loss_pct": 0.0, "kl_nats_per_token": 0.0, "top1_agreement_pct": 100.0}
    same = {"bleu": 100.0, "rouge1_pct": 100.0, "rouge2_pct": 100.0, "rougeL_pct": 100.0}
    for name, value in (none | same).items():
        assert (found[name].value, found[name].low, found[name].high) == (value,) * 3, name


def test_kv_caches_lose_by_their_bits(shop: Workshop) -> None:
    losses = [
        shop.judged(shop.model, kv_cache_dtype=kv).estimates["kl_nats_per_token"].value
        for kv in ("bf16", "int8", "fp8", "nvfp4")
    ]
    assert losses[0] == 0
    assert losses == sorted(losses)


def test_the_same_seed_gives_the_same_report(shop: Workshop) -> None:
    first, second, other = (shop.judged(shop.made("nvfp4"), seed=s) for s in (0, 0, 1))
    assert first.estimates == second.estimates
    assert first.estimates["kl_nats_per_token"].low != other.estimates["kl_nats_per_token"].low
    loss = first.estimates["perplexity_loss_pct"]
    assert loss.low < loss.value < loss.high


def test_config_keeps_what_the_model_says(shop: Workshop) -> None:
    """transformers 5 spells rope_theta in a way that TensorRT-LLM's transformers 4 overlooks."""
    before = json.loads((shop.model / "config.json").read_text())
    for scheme in ("fp8", "int4_rtn"):
        after = json.loads((shop.made(scheme) / "config.json").read_text())
        described = after.pop("quantization_config")
        assert after == before
        assert described["quant_method"] in ("modelopt", "compressed-tensors")


def test_modelopt_form_names_the_algorithm_for_tensorrt_llm(shop: Workshop) -> None:
    expected = {"fp8": "FP8", "int4_awq": "W4A16_AWQ", "w4a8_awq": "W4A8_AWQ", "nvfp4": "NVFP4"}
    for scheme, algorithm in expected.items():
        found = json.loads((shop.made(scheme) / "hf_quant_config.json").read_text())
        assert found["quantization"]["quant_algo"] == algorithm
    fp8 = json.loads((shop.made("fp8") / "hf_quant_config.json").read_text())["quantization"]
    assert fp8["kv_cache_quant_algo"] == "FP8"
    assert "lm_head" in fp8["exclude_modules"]


def test_fp8_blocks_have_one_scale_each(shop: Workshop) -> None:
    folder = shop.made("fp8_block")
    gate = tensors_of(folder, "model.layers.0.mlp.gate_proj")
    assert gate["weight"].dtype == torch.float8_e4m3fn
    assert gate["weight_scale_inv"].shape == (2, 1)
    assert tensors_of(folder, "model.layers.0.self_attn.v_proj")["v_scale"].item() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int3"}, "'int3' is unknown; known: fp8, fp8_block"),
        ({"kv_cache_dtype": "int8"}, "no engine loads a checkpoint with it"),
        ({"scheme": "int4_awq", "kv_cache_dtype": "nvfp4"}, "needs weights in fp8 or nvfp4"),
        ({"model": Path("nowhere")}, "not a folder"),
        ({"calibration_data": Path("nowhere.txt")}, "nowhere.txt: cannot be read"),
        ({"device": "tpu"}, "known: auto, cpu, cuda"),
    ],
)
def test_wrong_input_is_one_line(shop: Workshop, changes: dict[str, Any], message: str) -> None:
    request = replace(shop.request("fp8", out=shop.folder / "never"), **changes)
    with pytest.raises(PlannerError, match=message) as caught:
        quantize(request)
    assert "\n" not in str(caught.value)
    assert not request.out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no text"), ("too short", "hold 9 tokens|hold . tokens")],
)
def test_poor_calibration_data_are_refused(
    shop: Workshop, tmp_path: Path, text: str, message: str
) -> None:
    data = tmp_path / "calibration.txt"
    data.write_text(text)
    with pytest.raises(PlannerError, match=message):
        quantize(shop.request("fp8", calibration_data=data, out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.txt"]


def test_a_model_that_does_not_divide_is_refused(shop: Workshop, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(shop.model, odd)
    config = LlamaConfig.from_pretrained(odd)
    config.intermediate_size = 192
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(odd)
    with pytest.raises(PlannerError, match="gate_proj is 192x128, not in multiples of 128x128"):
        quantize(shop.request("fp8_block", model=odd, out=tmp_path / "out"))
    with pytest.raises(PlannerError, match="is quantized already"):
        quantize(shop.request("fp8", model=shop.made("fp8"), out=tmp_path / "out"))


def test_nothing_half_written_remains(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_model: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(modelopt, "export", fail)
    with pytest.raises(OSError, match="No space"):
        quantize(shop.request("fp8", out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_is_told(shop: Workshop, tmp_path: Path) -> None:
    made: Quantized = quantize(shop.request("int4_rtn", out=tmp_path / "out"))
    told = made.to_json()
    assert told["bytes_after"] < told["bytes_before"]
    assert told["calibration_tokens"] == CALIBRATION.num_samples * CALIBRATION.max_tokens
    with pytest.raises(PlannerError, match="exists"):
        quantize(shop.request("int4_rtn", out=tmp_path / "out"))


def test_a_missing_package_is_named_with_its_install_line(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(PlannerError, match=r"not installed; pip install 'trtllm-planner\[quant"):
        quantize(shop.request("fp8", out=tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(PlannerError, match="sacrebleu is not installed; pip install"):
        shop.judged(shop.model, new_tokens=4)


def test_every_scheme_has_an_engine_and_a_row() -> None:
    for name, row in SCHEMES.items():
        assert row.quantization in QUANTIZATIONS
        assert {"trtllm", "vllm"} & set(row.loaded_by), name
        assert row.form is not Form.MODELOPT or "trtllm" in row.loaded_by
        assert all(row.loaded_by.values())
    assert 90 in SCHEMES["fp8"].compute_capabilities("trtllm")
    assert 90 not in SCHEMES["nvfp4"].compute_capabilities("trtllm")
    assert SCHEMES["int4_awq"].compute_capabilities("vllm") == ()
