"""torch.nn.EmbeddingBag and FBGEMM's table-batched kernel, on a stream of ours.

Each function takes the stream, what is looked up, where all tables lie one after the other, and batches; it returns
what launches batch i modulo their number. What they need is imported here alone, and may be missing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.gpu.effort import Work
from blsrdma.gpu.arrays import GpuArray

if TYPE_CHECKING:
    import torch

    from bench.gpu.lookup_rank import Batch

Launch = Callable[[int], object]


def view(at: int, shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
    """Memory of ours as a CUDA tensor."""
    import torch

    return torch.as_tensor(GpuArray(at, shape, np.dtype(dtype)), device="cuda")


def torch_bags(stream: int, work: Work, address: int, given: Sequence[Batch], fused: bool) -> Launch:
    """A bag of every table, or one over the rows of all, on the memory that blsrdma reads."""
    import torch
    from torch.nn.functional import embedding_bag

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} has no CUDA here")
    on = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]

    weights = view(address, (work.tables * work.rows, work.dim), np.float32)
    count, samples = work.samples * work.pooling, work.samples
    ends = work.tables * samples + 1 if fused else samples + 1
    inputs = [
        (view(each.at_fused if fused else each.at_indices, (work.tables * count,), np.int64),
         view(each.at_offsets, (ends,), np.int64))
        for each in given
    ]  # fmt: skip

    def launch_fused(i: int) -> object:
        indices, offsets = inputs[i % len(inputs)]
        with torch.cuda.stream(on), torch.inference_mode():
            return embedding_bag(indices, weights, offsets, mode="sum", include_last_offset=True)

    def launch_each(i: int) -> object:
        indices, offsets = inputs[i % len(inputs)]
        out = []
        with torch.cuda.stream(on), torch.inference_mode():
            for t in range(work.tables):
                bags, rows = indices[t * count : (t + 1) * count], weights[t * work.rows : (t + 1) * work.rows]
                out.append(embedding_bag(bags, rows, offsets, mode="sum", include_last_offset=True))
        return out

    return launch_fused if fused else launch_each


def fbgemm(stream: int, work: Work, _address: int, given: Sequence[Batch]) -> Launch:
    """FBGEMM's kernel for inference, fp32 rows, which has tables of its own."""
    import torch
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    on = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
    specs = [(str(t), work.rows, work.dim, SparseType.FP32, EmbeddingLocation.DEVICE) for t in range(work.tables)]
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(specs, output_dtype=SparseType.FP32, device="cuda")
    kernel.fill_random_weights()
    inputs = [(torch.from_numpy(each.indices.reshape(-1)).int().cuda(), torch.from_numpy(each.offsets).int().cuda())
              for each in given]  # fmt: skip

    def launch(i: int) -> None:
        with torch.cuda.stream(on), torch.inference_mode():
            kernel(*inputs[i % len(inputs)])

    return launch


def forget() -> None:
    """Give back what torch keeps of GPU memory, once nobody refers to the launches any more."""
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
