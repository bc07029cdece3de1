"""Stands in for examples/quantization/quantize.py of TensorRT-LLM 1.2: its flags, its files."""

import argparse
import json
import pathlib

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--model_dir", required=True)
parser.add_argument("--output_dir", required=True, type=pathlib.Path)
parser.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"))
parser.add_argument(
    "--qformat",
    choices=(
        "nvfp4", "fp8", "int8_sq", "int4_awq", "w4a8_awq", "int8_wo", "int4_wo", "full_prec",
    ),
)  # fmt: skip
parser.add_argument("--kv_cache_dtype", choices=("int8", "fp8"))
parser.add_argument("--tp_size", type=int, default=1)
parser.add_argument("--pp_size", type=int, default=1)
arguments = parser.parse_args()

arguments.output_dir.mkdir(parents=True)
configuration = {
    "source": arguments.model_dir,
    "quantization": {"qformat": arguments.qformat, "kv_cache": arguments.kv_cache_dtype},
    "mapping": {"tp_size": arguments.tp_size, "pp_size": arguments.pp_size},
}
(arguments.output_dir / "config.json").write_text(json.dumps(configuration))
