"""Messages and tables in GPU memory. Nothing here needs a GPU, or CUDA, to be imported.

- `device`: CUDA's driver, devices, streams, whatever library they come from
- `arrays`: GPU tensors and arrays in, views of the same kind out
- `exchange`, `handle`: the bounded-lag all-to-all on windows in GPU memory, `blsrdma.GpuExchange`
- `look`: what `python -m blsrdma info` tells of them
- `compiler`, `pooling`: kernels, compiled when they are first used
- `tables`: a `blsrdma.Lookup`'s tables in GPU memory, pooled there by their owner
- `lookup`: tables in the GPU memory of several ranks, `blsrdma.gpu.lookup.GpuLookup`
"""
