"""Command line -> `Options`, checked: the one place that knows defaults that depend on other flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dlrm import delays, flags
from dlrm.data import CRITEO_DENSE
from dlrm.errors import OptionError
from dlrm.shape import ModelShape, interaction_width

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Options:
    """One run, resolved: every field has its final value; times are seconds. See `python -m dlrm --help`."""

    arch_sparse_feature_size: int
    arch_embedding_size: tuple[int, ...] | None
    arch_mlp_bot: tuple[int, ...]
    arch_mlp_top: tuple[int, ...]  # without the first width, which follows from the interaction
    arch_interaction_op: Literal["dot", "cat"]
    arch_interaction_itself: bool
    mini_batch_size: int
    num_batches: int
    data_generation: Literal["sample", "random", "dataset"]
    raw_data_file: str
    max_ind_range: int
    num_indices_per_lookup: int
    num_indices_per_lookup_fixed: bool
    numpy_rand_seed: int
    load_model: str | None
    print_freq: int
    ranks: int | None
    lag: int
    delay: str
    delay_seed: int
    dense_block: int
    threads: int
    verify: bool
    digest: bool
    predictions: str | None
    json: str | None
    timeout: float
    window_bytes: int | None
    debug: bool

    def shape(self, table_rows: tuple[int, ...]) -> ModelShape:
        """The model's shape for tables of `table_rows`."""
        dim, op, itself = self.arch_sparse_feature_size, self.arch_interaction_op, self.arch_interaction_itself
        width = interaction_width(len(table_rows), dim, op, itself)
        return ModelShape(table_rows, dim, self.arch_mlp_bot, (width, *self.arch_mlp_top), op, itself)


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Exits with a line of usage where a flag is unknown; raises OptionError for bad values."""
    given = vars(flags.parser().parse_args(argv))
    bottom = given["arch_mlp_bot"] or (CRITEO_DENSE, 512, 256, 64, given["arch_sparse_feature_size"])
    del given["inference_only"]
    asked = given["data_generation"]
    if given["raw_data_file"]:
        if asked not in (None, "dataset"):
            raise OptionError(f"--data-generation {asked} does not go with --raw-data-file")
        generation = "dataset"
    elif asked == "dataset":
        raise OptionError("--data-generation dataset wants --raw-data-file FILE")
    else:
        shaped = given["arch_embedding_size"] or given["num_indices_per_lookup"]
        generation = asked or ("random" if shaped else "sample")
    options = Options(
        **{
            **given,
            "arch_mlp_bot": bottom,
            "data_generation": generation,
            "num_indices_per_lookup": given["num_indices_per_lookup"] or 10,
            "digest": given["digest"] or given["verify"],
        }
    )
    _check(options)
    return options


def _check(options: Options) -> None:
    """What one flag's type cannot say. Raises OptionError."""
    dim, bottom = options.arch_sparse_feature_size, options.arch_mlp_bot
    if len(bottom) < 2:
        raise OptionError("--arch-mlp-bot wants at least two widths, such as 13-64-16")
    if bottom[-1] != dim:
        raise OptionError(
            f"--arch-mlp-bot ends in {bottom[-1]}, but --arch-sparse-feature-size is {dim}: they must agree"
        )
    if options.data_generation != "random" and bottom[0] != CRITEO_DENSE:
        raise OptionError(f"--arch-mlp-bot begins with {bottom[0]}, but the data have {CRITEO_DENSE} dense features")
    if options.arch_mlp_top[-1] != 1:
        raise OptionError(f"--arch-mlp-top ends in {options.arch_mlp_top[-1]}, wanted 1, the click")
    if options.max_ind_range == 0:
        raise OptionError("--max-ind-range 0: wanted a number of rows, or -1 for no limit")
    delays.parse(options.delay, options.delay_seed)
    if options.predictions and not options.predictions.endswith((".npy", ".csv")):
        raise OptionError(f"--predictions {options.predictions}: the name must end in .npy or .csv")
