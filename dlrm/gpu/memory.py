"""What a rank takes of its GPU's memory, and of page-locked host memory: computed before any of it is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blsrdma.errors import MemoryLimitExceeded
from blsrdma.settings import format_size
from blsrdma.windows import round_up, windows_needed
from dlrm.gpu import tiers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dlrm.gpu.tiers import Rows, Tier

USABLE = 0.9  # of a GPU: torch, cuBLAS and CUDA itself take memory, too


@dataclass(frozen=True)
class Needs:
    """Bytes of GPU memory, besides tables."""

    windows: int  # of the exchange, and what may have to be staged
    batches: int  # on their way
    dense: int  # parameters and activations

    @property
    def total(self) -> int:
        """All of it."""
        return self.windows + self.batches + self.dense

    def __str__(self) -> str:
        return (
            f"{format_size(self.windows)} of windows, {format_size(self.batches)} for batches on their way, "
            f"{format_size(self.dense)} for the MLPs"
        )


@dataclass(frozen=True)
class Plan:
    """Where the rows of a rank's tables lie, and what that takes."""

    needs: Needs
    tiers: tuple[Tier, ...]
    gpu_bytes: int  # of tables
    host_bytes: int

    def __str__(self) -> str:
        rows, hot = sum(tier.rows for tier in self.tiers), sum(tier.hot_rows for tier in self.tiers)
        where = "all rows" if hot == rows else f"{hot:,} of {rows:,} rows"
        text = f"{format_size(self.gpu_bytes)} of tables ({where}), {self.needs}"
        return text + (f"; {format_size(self.host_bytes)} of page-locked host memory" if self.host_bytes else "")


def window_bytes(largest: int, ranks: int, lag: int) -> int:
    """Of windows for messages up to `largest` bytes; twice, for where peers' GPU memory cannot be written."""
    windows = windows_needed(lag) * round_up(max(1, largest), tiers.ALIGNMENT) * ranks
    return windows * (2 if ranks > 1 else 1)


def limit(asked: int | None, total: int, free: int, sharing: int) -> int:
    """What a rank may take of a GPU that `sharing` ranks share. Raises MemoryLimitExceeded for more than is free."""
    if asked is None:
        return min(free, int(total * USABLE) // sharing)
    if asked > free:
        raise MemoryLimitExceeded(f"--gpu-memory {format_size(asked)}: {format_size(free)} of the GPU are free")
    return asked


def plan(most: int, host_most: int, needs: Needs, rows: Sequence[int], row_bytes: int, asked: Sequence[Rows]) -> Plan:
    """Place rows of tables in what `needs` leaves of `most` bytes; see `tiers.choose`. Raises MemoryLimitExceeded."""
    if needs.total > most:
        raise MemoryLimitExceeded(
            f"a rank needs {format_size(needs.total)} of GPU memory besides its tables ({needs}): the limit is "
            f"{format_size(most)} (--gpu-memory)"
        )
    chosen = tuple(tiers.choose(rows, row_bytes, most - needs.total, asked))
    on_gpu = sum(tier.gpu_bytes(row_bytes) for tier in chosen)
    on_host = sum(tier.host_bytes(row_bytes) for tier in chosen)
    if on_host > host_most:
        raise MemoryLimitExceeded(
            f"tables that do not fit in GPU memory need {format_size(on_host)} of page-locked host memory: the limit "
            f"is {format_size(host_most)} (BLSRDMA_MEMORY_LIMIT; half of the machine's memory, shared by its ranks)"
        )
    return Plan(needs, chosen, on_gpu, on_host)
