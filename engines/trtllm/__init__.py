"""TensorRT-LLM: its defaults, options, captured graphs, scripts and benchmark limits."""

from engines.trtllm.spec import SPEC

__all__ = ["SPEC"]
