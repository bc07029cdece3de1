"""Makes quantized checkpoints: calibrated by ModelOpt, written in a form that engines load."""
