"""DLRM on GPUs. Nothing here needs a GPU, or CUDA, to be imported."""
