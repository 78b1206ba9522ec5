"""What the engine asks of a GPU besides blsrdma: tensors, and functions of torch's put on streams, or made CUDA graphs.

Here with torch on CUDA. Tests have another one (tests/gpu/accelerator.py) over a simulated device, so that all else is
exercised without a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from blsrdma.gpu import device as devices
from dlrm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blsrdma.gpu.device import Device

WARM_UPS = 3  # of what becomes a graph: cuBLAS chooses its kernels, and allocates, in the first ones


@dataclass(frozen=True)
class Lane:
    """A stream: `address` for kernels and the exchange, `torch` where torch has it."""

    address: int
    torch: Any = None


class Accelerator(ABC):
    """A device, and torch on it."""

    device: Device

    @abstractmethod
    def lane(self) -> Lane:
        """A stream of its own, not ordered with any other."""

    @abstractmethod
    def zeros(self, *shape: int) -> Tensor:
        """A float32 tensor on the device, aligned to 256 bytes; filled when `settle` returns."""

    @abstractmethod
    def settle(self) -> None:
        """Wait for what has been put on any stream so far: at the start, not in the loop."""

    @abstractmethod
    def prepared(self, work: Callable[[], None], lane: Lane, graph: bool) -> Callable[[], None]:
        """What puts `work` on a stream, each time it is called; evaluated here some times before. `graph`: as one CUDA
        graph. `work` uses the same tensors each time, and allocates nothing that it keeps."""

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy on the device of a float32 tensor."""
        there = self.zeros(*tensor.shape)
        self.settle()
        source = tensor.contiguous()
        self.device.copy(there.data_ptr(), source.data_ptr(), source.nbytes)
        self.settle()
        return there


class TorchAccelerator(Accelerator):
    """torch on CUDA device number `ordinal` of this process. Raises OptionError where this torch has no CUDA."""

    def __init__(self, ordinal: int, tf32: bool) -> None:
        self.device = devices.open_device(ordinal)
        if not torch.cuda.is_available():
            raise OptionError(f"--device cuda: torch {torch.__version__} cannot use CUDA: install a build that can")
        torch.cuda.set_device(ordinal)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        self._on = torch.device("cuda", ordinal)

    def lane(self) -> Lane:
        """See `Accelerator.lane`."""
        stream: Any = torch.cuda.Stream(self._on)  # type: ignore[no-untyped-call]
        return Lane(int(stream.cuda_stream), stream)

    def zeros(self, *shape: int) -> Tensor:
        """See `Accelerator.zeros`."""
        return torch.zeros(shape, device=self._on)

    def settle(self) -> None:
        """See `Accelerator.settle`."""
        torch.cuda.synchronize(self._on)

    def prepared(self, work: Callable[[], None], lane: Lane, graph: bool) -> Callable[[], None]:
        """See `Accelerator.prepared`."""
        self.settle()
        with torch.cuda.stream(lane.torch):
            for _ in range(WARM_UPS):
                work()
        self.settle()
        if not graph:

            def put() -> None:
                with torch.cuda.stream(lane.torch):
                    work()

            return put
        captured = torch.cuda.CUDAGraph()
        # Other threads (UCX, torch's own) may use CUDA meanwhile: what they do must not end the capture.
        with torch.cuda.graph(captured, stream=lane.torch, capture_error_mode="thread_local"):
            work()

        def replay() -> None:
            with torch.cuda.stream(lane.torch):
                captured.replay()

        return replay


def open_accelerator(local_rank: int, tf32: bool) -> Accelerator:
    """That of a rank: LOCAL_RANK modulo the GPUs of its host. Raises GpuError where there is none, OptionError."""
    return TorchAccelerator(local_rank % devices.count(), tf32)
