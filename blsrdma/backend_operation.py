"""One all_to_all of the backend: what it holds while it is in flight, and how its messages get into its outputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from blsrdma.errors import CountsError
from blsrdma.handle import Handle


class Operation:
    """One all_to_all, from its post until its outputs are filled and its input may be overwritten."""

    __slots__ = ("done", "error", "expected", "futures", "handle", "outputs", "received")

    def __init__(self, handle: Handle, outputs: Tensor | list[Tensor], expected: list[int]) -> None:
        self.handle = handle  # keeps the input
        self.outputs = outputs  # one tensor for all ranks' messages, or one each
        self.expected = expected  # items from each rank
        self.received = False  # the outputs are filled, or never will be: see error
        self.done = False
        self.error: BaseException | None = None
        self.futures: list[torch.futures.Future[Any]] = []

    def tensors(self) -> list[Tensor]:
        return self.outputs if isinstance(self.outputs, list) else [self.outputs]

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.received = self.done = True

    def tell(self) -> None:
        """Complete the futures. Not under a lock: they run their owners' callbacks."""
        while self.futures:
            future = self.futures.pop()
            if self.error is None:
                future.set_result(self.tensors())
            else:
                future.set_exception(self.error)


def receive(handle: Handle, outputs: Tensor | list[Tensor], expected: list[int], timeout: float) -> None:
    """Wait for every rank's message and fill the outputs; then nothing needs the windows any more.

    Raises PeerTimeout, after which it may be called again; CountsError when a message has not the expected size.
    """
    if isinstance(outputs, list):
        for output, message in zip(outputs, copy_out(handle, None, expected, timeout), strict=True):
            _store(output, message)
    elif outputs.is_contiguous() and not outputs.is_neg():
        copy_out(handle, outputs, expected, timeout)
    else:
        whole = torch.empty(outputs.shape, dtype=outputs.dtype)
        copy_out(handle, whole, expected, timeout)
        _store(outputs, whole)


def _store(output: Tensor, data: Tensor) -> None:
    with torch.inference_mode():  # in which any tensor may be written: of inference, or one that requires grad
        output.copy_(data.view(output.shape))


def copy_out(handle: Handle, out: Tensor | None, expected: list[int], timeout: float) -> Any:
    """The messages of an iteration one after the other in `out`; else views of them."""
    if _PLACES:
        return handle.wait(timeout, out=out, counts=expected)
    received = handle.wait(timeout)
    for source, (got, wanted) in enumerate(zip(received.counts(), expected, strict=True)):
        if got != wanted:
            raise CountsError(
                f"iteration {handle.iteration}: rank {source} sent {got} items to rank "
                f"{handle._exchange.rank}, which expected {wanted}"
            )
    if out is None:
        return received
    memory, start = out.detach().reshape(-1).view(torch.uint8).numpy(), 0
    for message in received:
        data = message.detach().reshape(-1).view(torch.uint8).numpy()
        memory[start : start + len(data)] = data
        start += len(data)
    return received


# The exchange of a later commit places messages itself; when it is here, copy_out is its first two lines.
_PLACES = "out" in inspect.signature(Handle.wait).parameters
