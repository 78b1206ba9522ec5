"""What torch.distributed hands out for an all_to_all: `AllToAllWork`, and `Done` for one that is over already."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from blsrdma.backend_lane import Lane
    from blsrdma.backend_operation import Operation

_RecordFunctionFast: Any = torch._C._profiler._RecordFunctionFast
_NOT_GIVEN = timedelta(0)


class AllToAllWork(dist.Work):
    """An operation in flight. Dropping it is harmless: the lane keeps the operation and its tensors."""

    _lane: Lane
    _operation: Operation

    @classmethod
    def of(cls, lane: Lane, operation: Operation) -> AllToAllWork:
        work = cls()  # without an __init__ of ours, which would cost more than the object
        work._lane = lane
        work._operation = operation
        return work

    def wait(self, timeout: timedelta = _NOT_GIVEN) -> bool:
        """Return when the output is filled and the input may be overwritten. Raises blsrdma.errors; after a PeerTimeout
        it may be called again."""
        with _RecordFunctionFast("bls:wait"):
            self._lane.wait(self._operation, None if timeout <= _NOT_GIVEN else timeout.total_seconds())
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._lane.poll(self._operation)

    def is_success(self) -> bool:
        return self.is_completed() and self._operation.error is None

    def exception(self) -> BaseException | None:
        return self._operation.error

    def result(self) -> list[Tensor]:
        self.wait()
        return self._operation.tensors()

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        return self._lane.future(self._operation)

    def source_rank(self) -> int:
        raise RuntimeError("an all_to_all has no single source rank")


class Done(dist.Work):
    """An operation that was over when it was returned."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: timedelta = _NOT_GIVEN) -> bool:  # noqa: ARG002
        return True

    def synchronize(self) -> None: ...

    def block_current_stream(self) -> None: ...

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._tensors

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self._tensors)
        return future
