"""What is measured, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What is looked up in one case."""

    rows: int  # of each table
    tables: int
    dim: int
    pooling: int
    samples: int
    block: int  # float32 elements that the tables repeat
    draw: str = "zipf:s=1.05"

    @property
    def table_bytes(self) -> int:
        """Of all tables."""
        return self.rows * self.tables * self.dim * 4


@dataclass(frozen=True)
class Effort:
    """The defaults are what docs/gpu.md shows."""

    prepare: str = ""  # a function "module:name" that every rank calls first (see device.opened)
    repeat: int = 7  # rounds
    limit: float = 90.0  # seconds that one call of the ranks may take
    copy_bytes: int = 1 << 30
    # lookups
    rows: int = 0  # of each table; 0: as many as fill `memory_share` of the GPU
    memory_share: float = 0.4
    tables: int = 26
    dim: int = 128
    pooling: int = 20
    samples: int = 8192
    block: int = 1 << 24  # random numbers that the tables repeat
    draws: tuple[str, ...] = ("zipf:s=1.05", "uniform")
    hot_shares: tuple[float, ...] = (0.95, 0.8)
    tier_rows: int = 250_000  # of each table that lies in two tiers; a copy of most of them lies in host memory
    kernel_ms: float = 20.0  # of one kernel in one round
    # exchange
    ranks: tuple[int, ...] = (2, 4)
    sizes: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 16 << 20)  # bytes from each rank to each other
    lags: tuple[int, ...] = (0, 4)
    block_seconds: float = 0.03  # of one system in one round
    # DLRM: MLPerf v1's shape
    model_dim: int = 128
    bottom: str = "512-256"  # hidden layers
    top: str = "1024-1024-512-256-1"
    dlrm_bytes: int = 4 << 30  # of all tables
    batch: int = 8192
    batches: int = 60  # that fit into memory before time is taken (dlrm.data.batch.preload)
    lag: int = 4
    delay: str = "exp:p=0.1,mean=2ms"
    runs: int = 7


QUICK = Effort(repeat=3, copy_bytes=1 << 28, kernel_ms=5.0, block_seconds=0.01, memory_share=0.1, tier_rows=50_000,
               ranks=(2,), batches=40, runs=2)  # fmt: skip
