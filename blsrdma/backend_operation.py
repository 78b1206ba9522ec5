"""One all_to_all of the backend: what it holds while it is in flight, and how its messages get into its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from blsrdma.handle import Handle


class Operation:
    """One all_to_all, from its post until its outputs are filled and its input may be overwritten."""

    received = False  # the outputs are filled, or never will be: see error
    done = False
    error: BaseException | None = None

    def __init__(self, handle: Handle, outputs: Tensor | list[Tensor], expected: list[int]) -> None:
        self.handle = handle  # keeps the input
        self.outputs = outputs  # one tensor for all ranks' messages, or one each
        self.expected = expected  # items from each rank
        self.futures: list[torch.futures.Future[Any]] = []

    def tensors(self) -> list[Tensor]:
        return self.outputs if isinstance(self.outputs, list) else [self.outputs]

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.received = self.done = True

    def tell(self) -> None:
        """Complete the futures. Not under a lock: they run their owners' callbacks."""
        while self.futures:
            try:
                future = self.futures.pop()
            except IndexError:
                return  # another thread was faster
            if self.error is None:
                future.set_result(self.tensors())
            else:
                future.set_exception(self.error)


def receive(handle: Handle, outputs: Tensor | list[Tensor], expected: list[int], timeout: float) -> None:
    """Wait for every rank's message and fill the outputs; then nothing needs the windows any more.

    Raises PeerTimeout, after which it may be called again; CountsError when a message has not the expected size.
    """
    if isinstance(outputs, list):
        for output, message in zip(outputs, handle.wait(timeout, counts=expected), strict=True):
            _store(output, message)
    elif outputs.is_contiguous() and not outputs.is_neg():
        handle.wait(timeout, out=outputs, counts=expected)
    else:
        whole = torch.empty(outputs.shape, dtype=outputs.dtype)
        handle.wait(timeout, out=whole, counts=expected)
        _store(outputs, whole)


def _store(output: Tensor, data: Tensor) -> None:
    with torch.inference_mode():  # in which any tensor may be written: of inference, or one that requires grad
        output.copy_(data.view(output.shape))
