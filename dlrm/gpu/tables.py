"""Tables of one rank on a GPU: rows in its memory, and in page-locked host memory what does not fit there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma.errors import GpuError
from blsrdma.gpu.pooling import GpuBags, GpuTable, PooledLookup
from dlrm.asking import row_format
from dlrm.gpu.staging import on_host
from dlrm.placement import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from blsrdma.gpu.device import Device
    from dlrm.gpu.tiers import Tier
    from dlrm.kernels import Kernel
    from dlrm.shape import ModelShape
    from dlrm.tables import Pooling, Tables

COPY_SECONDS = 600.0  # for the rows of one table


class GpuTables:
    """What a rank has of the tables, as dlrm.tables.Tables, on `device`.

    `build` makes the rows of one piece, in host memory, which is given back before the next one's. `tiers`: which rows
    of each of `owned` are hot. Raises OptionError for rows that the kernel does not pool; GpuError.
    """

    def __init__(
        self,
        device: Device,
        shape: ModelShape,
        owned: Sequence[int | Piece],
        kernel: Kernel,
        pooling: Pooling,
        tiers: Sequence[Tier],
        build: Callable[[Piece], Tables],
    ) -> None:
        self.owned = tuple(Piece(one) if isinstance(one, int) else one for one in owned)
        self.dim, self.table_rows, self.pooling, self.kernel = shape.dim, shape.table_rows, pooling, kernel
        self._device, self._memory = device, list[Any]()
        self._row_bytes = kernel.row_bytes(shape.dim)
        self.hot_rows = sum(tier.hot_rows for tier in tiers)
        self.rows = sum(tier.rows for tier in tiers)
        self.gpu_bytes = sum(tier.gpu_bytes(self._row_bytes) for tier in tiers)
        self.host_bytes = sum(tier.host_bytes(self._row_bytes) for tier in tiers)
        placed = [
            self._put(piece, tier, build(piece).stored()[0].numpy().view(np.uint8))
            for piece, tier in zip(self.owned, tiers, strict=True)
        ]
        self._lookup = PooledLookup(device, placed, shape.dim, row_format(kernel)) if placed else None

    @property
    def tables(self) -> tuple[int, ...]:
        """The tables of which there is something here, in the order of lookups."""
        return tuple(piece.table for piece in self.owned)

    def nbytes(self) -> int:
        """Bytes of all rows as stored."""
        return self.rows * self._row_bytes

    def pool(self, bags: GpuBags, destinations: Sequence[int], starts: Sequence[int], stream: int) -> int | None:
        """See PooledLookup.launch; None where there are no tables, or no samples."""
        if self._lookup is None or not bags.samples:
            return None
        return self._lookup.launch(bags, destinations, starts, stream)

    def compile(self, zeros: int, out: int, weighted: bool) -> None:
        """Pool a sample of empty bags: `zeros` are 4 int64 for each table, `out` has room for its vectors."""
        for weights in {0, zeros if weighted else 0}:
            self.pool(GpuBags(1, zeros, 0, zeros, 2, zeros, weights), [out], [0, 1], 0)

    def check(self, launch: int | None) -> None:
        """Raise BagsError where a launch that is done found what dlrm.bags should have."""
        if launch is not None and self._lookup is not None:
            self._lookup.check(launch)

    def close(self) -> None:
        """Give all memory back. No launch may be in progress."""
        if self._lookup is not None:
            self._lookup.close()
        for memory in self._memory:
            memory.close()

    def _put(self, piece: Piece, tier: Tier, stored: NDArray[np.uint8]) -> GpuTable:
        """The rows [rows, bytes] of one piece to where they belong."""
        rows = range(self.table_rows[piece.table]) if piece.rows is None else piece.rows
        hot = self._upload(stored if tier.hot is None else stored[tier.hot]) if tier.hot_rows else 0
        slots = self._upload(tier.slots().view(np.uint8)) if tier.mapped else 0
        cold = 0
        if not tier.whole:
            self._memory.append(memory := self._device.host_memory(stored.nbytes))
            on_host(memory, stored.nbytes, np.uint8)[:] = stored.reshape(-1)
            cold = memory.address
        return GpuTable(
            piece.table, len(rows), hot, tier.hot_rows, cold, slots, rows.start, self.table_rows[piece.table],
            mean=self.pooling == "mean" and piece.rows is None,
        )  # fmt: skip

    def _upload(self, array: NDArray[np.uint8]) -> int:
        array = np.ascontiguousarray(array)
        self._memory.append(memory := self._device.memory(array.nbytes))
        self._device.copy(memory.address, array.ctypes.data, array.nbytes)
        if not self._device.synchronize(0, int(COPY_SECONDS * 1e9)):
            raise GpuError(f"{array.nbytes} bytes of tables did not reach the GPU in {COPY_SECONDS:g} s")
        return int(memory.address)
