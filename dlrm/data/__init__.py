"""Where batches come from: `open_source` picks the reader or generator that the options ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dlrm.errors import DataError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dlrm.data.batch import Batch
    from dlrm.options import Options

# Rows per table of Criteo Kaggle, 26 categorical features (33.8 M rows).
KAGGLE_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
# Of Criteo Terabyte with --max-ind-range 40000000 (MLPerf).
TERABYTE_ROWS = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10,
    2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip
# Rows in a bag of each table in MLPerf v2's multi-hot data.
MLPERF_HOTNESS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
CRITEO_DENSE = 13
DEFAULT_MAX_IND_RANGE = 10_000
TRACE_ROWS = 500_000
DATA_SETS = ("auto", "kaggle", "terabyte", "aliccp", "aliccp-multihot", "aliccp-raw", "trace")
DENSE_FEATURES = {"aliccp": 8, "aliccp-multihot": 1, "aliccp-raw": 1}  # all others: CRITEO_DENSE


class Source(Protocol):
    """A data set: its shape, and its batches, the same on every rank each time it is iterated."""

    dense_features: int
    table_rows: tuple[int, ...]

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """At most `num_batches` batches of `batch_size` samples (the last may be shorter); 0: all there are."""
        ...


def criteo_rows(max_ind_range: int, table_rows: tuple[int, ...] = KAGGLE_ROWS) -> tuple[int, ...]:
    """Rows per table for Criteo data: Kaggle's sizes, none larger than `max_ind_range` (-1: no limit)."""
    if max_ind_range < 0:
        return table_rows
    return tuple(min(rows, max_ind_range) for rows in table_rows)


def guess(path: str) -> str:
    """The data set a file holds, by its name; kaggle where that says nothing."""
    name = Path(path.split(",")[0]).name.lower()
    if Path(path).is_dir() and any(Path(path).glob("sample_skeleton*")):
        return "aliccp-raw"
    if "skeleton" in name:
        return "aliccp-raw"
    if "multihot" in name and "npz" not in name:
        return "aliccp-multihot"
    if "ali" in name and "ccp" in name:
        return "aliccp"
    if "trace" in name or "reuse" in name:
        return "trace"
    return "terabyte" if name.endswith((".bin", ".npy")) or Path(path).is_dir() else "kaggle"


def open_source(options: Options) -> Source:
    """The data set that `options` describe.

    Tables have the rows of --arch-embedding-size where it is given; else what the data say of themselves, or
    Kaggle's or Terabyte's, none above --max-ind-range. Raises DataError where a file cannot be opened.
    """
    given = options.arch_embedding_size
    match options.data_generation:
        case "dataset":
            return _open_file(options)
        case "random":
            from dlrm.data import draws
            from dlrm.data.uniform import Uniform

            rows = given or criteo_rows(options.max_ind_range)
            draw = draws.parse(options.rand_data_dist)
            lookups = _per_table(options.num_indices_per_lookup, len(rows))
            fixed = options.num_indices_per_lookup_fixed
            return Uniform(options.arch_mlp_bot[0], rows, options.numpy_rand_seed, lookups, fixed, draw)
        case "synthetic":
            from dlrm.data.stack import StackDistance

            rows = given or criteo_rows(options.max_ind_range)
            lookups = _per_table(options.num_indices_per_lookup, len(rows))
            fixed = options.num_indices_per_lookup_fixed
            seed = options.numpy_rand_seed
            return StackDistance(options.data_trace_file, options.arch_mlp_bot[0], rows, seed, lookups, fixed)
        case _:
            from dlrm.data.synthetic import CriteoSample

            return CriteoSample(given or criteo_rows(options.max_ind_range), options.numpy_rand_seed)


def _open_file(options: Options) -> Source:
    """The reader for a file or folder, by what --data-set says it holds and by its name."""
    path, limit, given = options.data_file, options.max_ind_range, options.arch_embedding_size
    sizes = given or criteo_rows(limit, TERABYTE_ROWS if options.data_set == "terabyte" else KAGGLE_ROWS)
    match options.data_set:
        case "trace":
            from dlrm.data.traces import Traces

            files = path.split(",")
            rows = given or (TRACE_ROWS,) * len(files)
            lookups = _per_table(options.num_indices_per_lookup, len(files))
            return Traces(files, options.arch_mlp_bot[0], rows, lookups, options.numpy_rand_seed)
        case "aliccp" | "aliccp-multihot" | "aliccp-raw":
            from dlrm.data import aliccp

            if given is None and limit < 0:
                raise OptionError("Ali-CCP's tables have no sizes of their own: give --arch-embedding-size or a limit")
            rows = given or (limit,) * len(aliccp.FIELDS)
            if options.data_set == "aliccp":
                return aliccp.AliCsv(path, rows)
            return (aliccp.AliRaw if options.data_set == "aliccp-raw" else aliccp.AliMultihot)(path, rows)
    if path.endswith(".npz"):
        from dlrm.data.processed import ProcessedNpz

        return ProcessedNpz(path, given, limit)
    if path.endswith(".bin"):
        from dlrm.data.mlperf import MlperfBinary

        return MlperfBinary(path, given, limit)
    if path.endswith(".npy") or Path(path).is_dir():
        from dlrm.data.mlperf import NpyDays

        return NpyDays(path, sizes, limit)
    from dlrm.data.criteo import CriteoFile

    return CriteoFile(path, sizes, limit)


def _per_table(values: tuple[int, ...], tables: int) -> tuple[int, ...]:
    """One value for each table. Raises OptionError."""
    if len(values) == 1:
        return values * tables
    if len(values) != tables:
        raise OptionError(f"--num-indices-per-lookup has {len(values)} numbers for {tables} tables")
    return values


__all__ = ["DataError", "Source", "criteo_rows", "guess", "open_source"]
