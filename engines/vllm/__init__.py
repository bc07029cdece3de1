"""vLLM: its defaults, flags and captured graphs."""

from engines.vllm.spec import SPEC

__all__ = ["SPEC"]
