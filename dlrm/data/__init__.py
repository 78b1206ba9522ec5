"""Where batches come from: `open_source` picks the reader or generator that the options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dlrm.data.batch import Batch
    from dlrm.options import Options

# Rows per table of Criteo Kaggle, 26 categorical features (33.8 M rows).
KAGGLE_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
CRITEO_DENSE = 13
DEFAULT_MAX_IND_RANGE = 10_000


class Source(Protocol):
    """A data set: its shape, and its batches, the same on every rank each time it is iterated."""

    dense_features: int
    table_rows: tuple[int, ...]

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """At most `num_batches` batches of `batch_size` samples (the last may be shorter); 0: all there are."""
        ...


def criteo_rows(max_ind_range: int) -> tuple[int, ...]:
    """Rows per table for Criteo data: Kaggle's sizes, none larger than `max_ind_range` (-1: no limit)."""
    if max_ind_range < 0:
        return KAGGLE_ROWS
    return tuple(min(rows, max_ind_range) for rows in KAGGLE_ROWS)


def open_source(options: Options) -> Source:
    """The data set that `options` describe.

    Tables have the rows of --arch-embedding-size where it is given; otherwise Kaggle's, none above --max-ind-range.
    Raises DataError where a file cannot be opened.
    """
    rows = options.arch_embedding_size or criteo_rows(options.max_ind_range)
    match options.data_generation:
        case "dataset":
            from dlrm.data.criteo import CriteoFile

            return CriteoFile(options.raw_data_file, rows, options.max_ind_range)
        case "random":
            from dlrm.data.uniform import Uniform

            return Uniform(
                options.arch_mlp_bot[0],
                rows,
                options.numpy_rand_seed,
                options.num_indices_per_lookup,
                options.num_indices_per_lookup_fixed,
            )
        case _:
            from dlrm.data.synthetic import CriteoSample

            return CriteoSample(rows, options.numpy_rand_seed)
