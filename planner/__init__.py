"""Plans how to run a large language model on TensorRT-LLM."""
