"""all_to_all of CUDA tensors in the process group "bls": a Lane whose exchange is a GpuExchange.

As with NCCL, what an operation does on the device is ordered by torch's current stream: its input is read once the
stream has come so far, and what is put on the stream after wait() finds the outputs. Unlike NCCL, wait() keeps the host
until the peers' messages have arrived.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from blsrdma.backend_lane import Lane
from blsrdma.errors import CountsError
from blsrdma.gpu.device import open_device, stream_address
from blsrdma.gpu.exchange import GpuExchange

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

    from blsrdma.gpu.handle import GpuHandle


class GpuLane(Lane):
    """All all_to_all operations of one group on one device."""

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float, *, device: int, **settings: Any) -> None:
        super().__init__(store, rank, ranks, timeout, **settings)
        self.device = device

    def _make(self) -> Any:
        return GpuExchange(
            self._store, self._rank, self._ranks, name="gpu_all_to_all", device=self.device, timeout=self.timeout,
            **self._settings,
        )  # fmt: skip

    def _sent(self, handle: Any) -> bool:
        # The device sees to it: what the stream does to the input from now on comes after the copies out of it.
        handle.order_after_sent(stream_address(None, self.device))
        return True

    def _receive(  # type: ignore[override]  # a method, for it needs to know the device
        self, handle: GpuHandle, outputs: Tensor | list[Tensor], expected: list[int], timeout: float
    ) -> None:
        """As blsrdma.backend_operation.receive, on the current stream."""
        stream = stream_address(None, self.device)
        received = handle.wait(timeout, stream=stream)
        for q, (count, got) in enumerate(zip(expected, received.counts(), strict=True)):
            if count != got:
                raise CountsError(
                    f"iteration {handle.iteration}: rank {q} sent {got} items to rank {self._rank}, which expected "
                    f"{count}"
                )
        if isinstance(outputs, list):
            places = [(output, 0) for output in outputs]
        else:
            places = [(outputs, start) for start in accumulate(expected[:-1], initial=0)]
        for q, ((output, start), count) in enumerate(zip(places, expected, strict=True)):
            if not count:
                continue
            if output.is_contiguous() and not output.is_neg():
                at = output.data_ptr() + start * handle.item_bytes
                open_device(self.device).copy(at, received.addresses[q], count * handle.item_bytes, stream)
            else:
                _store(output, received[q], start)
        handle.release(stream)


def _store(output: Tensor, message: Any, start: int) -> None:
    """Into a tensor that is not contiguous: its items in the order of its elements, from `start` on."""
    import torch

    with torch.inference_mode():
        if start == 0 and message.numel() == output.numel():
            output.copy_(message.view(output.shape))
        else:
            whole = output.contiguous()
            whole.view(-1, *message.shape[1:])[start : start + len(message)] = message
            output.copy_(whole)
