"""DLRM on GPUs: `python -m dlrm --device cuda`. Nothing here needs a GPU, or CUDA, to be imported.

- `worker`: what a rank does from start to end, where that differs from dlrm.worker
- `engine`: the loop: a batch is uploaded, pooled into the peers' windows, posted, and evaluated by streams
- `staging`: batches in page-locked memory; `slots`: memory of one on its way
- `tables`, `tiers`: rows in GPU memory, and in host memory where they do not fit; `memory`: what all of it takes
- `dense`: the MLPs, as CUDA graphs; `interaction`: what lies between them, straight from the receive windows
- `accelerator`: the little that is asked of torch on CUDA; the tests have another one, without a GPU
- `bounds`: --verify's float64 evaluation, and how far fp32 may be from it
"""
