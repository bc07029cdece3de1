"""Data only: GPUs, models, workloads, engines and fitted calibrations."""
