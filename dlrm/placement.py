"""Who owns what: contiguous blocks of tables and of samples.

Both follow the reference's rule (extend_distributed.py): the first `total % parts` ranks get one more than the others.
With more ranks than tables, or than samples, the last ranks get nothing, and still take part in every exchange.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


def split(total: int, parts: int) -> tuple[range, ...]:
    """Cut range(total) into `parts` contiguous ranges whose lengths differ by at most one, the longer ones first."""
    size, longer = divmod(total, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return tuple(range(lo, hi) for lo, hi in itertools.pairwise(starts))


@dataclass(frozen=True)
class Placement:
    """Tables and samples of a model with `num_tables` tables over `ranks` ranks."""

    num_tables: int
    ranks: int

    @property
    def tables(self) -> tuple[range, ...]:
        """The tables each rank owns, by rank."""
        return split(self.num_tables, self.ranks)

    def samples(self, batch_size: int) -> tuple[range, ...]:
        """The samples of a batch (as positions in it) each rank predicts, by rank; some may be empty."""
        return split(batch_size, self.ranks)

    def largest_message(self, batch_size: int, dim: int) -> int:
        """Bytes of the largest message any rank sends to another for batches up to `batch_size` samples (fp32)."""
        return max(map(len, self.samples(batch_size))) * max(map(len, self.tables)) * dim * 4
