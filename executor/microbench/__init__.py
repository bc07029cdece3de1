"""Times kernels on the local GPU, so that a GPU nobody has described can be calibrated."""
