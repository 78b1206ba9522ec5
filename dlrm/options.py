"""Command line -> `Options`, checked: the one place that knows defaults that depend on other flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dlrm import delays, flags
from dlrm.arrivals import Arrivals, parse_quiet
from dlrm.data import CRITEO_DENSE, DENSE_FEATURES, draws, guess
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
    data_generation: Literal["sample", "random", "synthetic", "dataset"]
    data_set: str
    raw_data_file: str
    processed_data_file: str
    data_trace_file: str
    max_ind_range: int
    first_sample: int
    num_indices_per_lookup: tuple[int, ...]  # one for all tables, or one for each
    num_indices_per_lookup_fixed: bool
    rand_data_dist: str
    numpy_rand_seed: int
    load_model: str | None
    loss_threshold: float
    pooling: Literal["sum", "mean"]
    quantize_emb_with_bit: int
    table_kernel: Literal["torch", "fbgemm"]
    dense_kernel: Literal["torch", "onednn"]
    placement: str
    row_wise_above: int
    replicate_below: int
    plan: bool
    input: Literal["replicated", "sharded"]
    exchange: Literal["alltoallv", "put", "get", "auto"]
    arrival_rate: float | None
    arrival: Literal["poisson", "fixed"]
    quiet: str
    dist_backend: Literal["bls", "gloo", "mpi", "nccl", "torch-bls"]
    print_freq: int
    print_time: bool
    ranks: int | None
    lag: int
    delay: str
    delay_seed: int
    dense_block: int
    threads: int
    verify: bool
    digest: bool
    profile: bool
    predictions: str | None
    json: str | None
    timeout: float
    window_bytes: int | None
    device: Literal["cpu", "cuda"]
    gpu_memory: int | None
    cuda_graphs: bool
    tf32: bool
    debug: bool

    @property
    def data_file(self) -> str:
        """The file or folder of samples, whichever flag named it."""
        return self.processed_data_file or self.raw_data_file

    def shape(self, table_rows: tuple[int, ...], dense_features: int | None = None) -> ModelShape:
        """The model's shape for tables of `table_rows`. Raises OptionError where the data have other dense features."""
        dim, op, itself = self.arch_sparse_feature_size, self.arch_interaction_op, self.arch_interaction_itself
        if dense_features is not None and dense_features != self.arch_mlp_bot[0]:
            raise OptionError(
                f"--arch-mlp-bot begins with {self.arch_mlp_bot[0]}, but the data have {dense_features} dense features"
            )
        width = interaction_width(len(table_rows), dim, op, itself)
        return ModelShape(table_rows, dim, self.arch_mlp_bot, (width, *self.arch_mlp_top), op, itself)

    def arrivals(self) -> Arrivals | None:
        """When batches arrive; None in a closed loop."""
        if self.arrival_rate is None:
            return None
        return Arrivals(self.arrival_rate, self.arrival == "poisson", self.delay_seed, parse_quiet(self.quiet))


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. Exits with a line of usage where a flag is unknown; raises OptionError for bad values."""
    given = vars(flags.parser().parse_args(argv))
    file = given["processed_data_file"] or given["raw_data_file"]
    generation = _generation(given, file)
    first = DENSE_FEATURES.get(given["data_set"], CRITEO_DENSE)
    if generation == "dataset" and given["data_set"] == "auto":
        given["data_set"] = guess(file)
        first = DENSE_FEATURES.get(given["data_set"], CRITEO_DENSE)
    bottom = given["arch_mlp_bot"] or (first, 512, 256, 64, given["arch_sparse_feature_size"])
    if given["test_mini_batch_size"] > 0:
        given["mini_batch_size"] = given["test_mini_batch_size"]
    for name in ("inference_only", "test_mini_batch_size"):
        del given[name]
    options = Options(
        **{
            **given,
            "arch_mlp_bot": bottom,
            "dist_backend": given["dist_backend"] or "bls",
            "data_generation": generation,
            "num_indices_per_lookup": given["num_indices_per_lookup"] or (10,),
            "digest": given["digest"] or given["verify"],
        }
    )
    _check(options)
    return options


def _generation(given: dict[str, Any], file: str) -> str:
    """Where batches come from, as --data-generation says or the other flags tell."""
    asked: str | None = given["data_generation"]
    if given["processed_data_file"] and given["raw_data_file"]:
        raise OptionError("--raw-data-file and --processed-data-file: give one of them")
    if file:
        if asked not in (None, "dataset"):
            raise OptionError(f"--data-generation {asked} does not go with a file of samples")
        return "dataset"
    if asked == "dataset":
        raise OptionError("--data-generation dataset wants --raw-data-file FILE")
    if given["data_trace_file"]:
        if asked not in (None, "synthetic"):
            raise OptionError(f"--data-generation {asked} does not go with --data-trace-file")
        return "synthetic"
    if asked == "synthetic":
        raise OptionError("--data-generation synthetic wants --data-trace-file FILE")
    shaped = given["arch_embedding_size"] or given["num_indices_per_lookup"] or given["rand_data_dist"] != "uniform"
    return asked or ("random" if shaped else "sample")


def _check(options: Options) -> None:
    """What one flag's type cannot say. Raises OptionError."""
    dim, bottom = options.arch_sparse_feature_size, options.arch_mlp_bot
    if len(bottom) < 2:
        raise OptionError("--arch-mlp-bot wants at least two widths, such as 13-64-16")
    if bottom[-1] != dim:
        raise OptionError(
            f"--arch-mlp-bot ends in {bottom[-1]}, but --arch-sparse-feature-size is {dim}: they must agree"
        )
    if options.data_generation == "sample" and bottom[0] != CRITEO_DENSE:
        raise OptionError(f"--arch-mlp-bot begins with {bottom[0]}, but the data have {CRITEO_DENSE} dense features")
    if options.arch_mlp_top[-1] != 1:
        raise OptionError(f"--arch-mlp-top ends in {options.arch_mlp_top[-1]}, wanted 1, the click")
    if options.max_ind_range == 0:
        raise OptionError("--max-ind-range 0: wanted a number of rows, or -1 for no limit")
    delays.parse(options.delay, options.delay_seed)
    parse_quiet(options.quiet)
    if options.quiet != "none" and (options.arrival_rate is None or options.input != "sharded"):
        raise OptionError("--quiet wants --arrival-rate and --input sharded: else every rank has every batch")
    if options.input == "sharded" and options.dist_backend != "bls":
        raise OptionError(f"--input sharded wants --dist-backend bls, not {options.dist_backend}")
    if options.data_generation == "random":
        draws.parse(options.rand_data_dist)
    if not 0 <= options.loss_threshold < 0.5:
        raise OptionError(f"--loss-threshold {options.loss_threshold} is not between 0 and 0.5")
    if options.quantize_emb_with_bit == 4 and dim % 2:
        raise OptionError(f"--quantize-emb-with-bit 4 wants an even --arch-sparse-feature-size, not {dim}")
    if options.table_kernel == "fbgemm" and options.quantize_emb_with_bit not in (8, 4):
        raise OptionError("--table-kernel fbgemm wants --quantize-emb-with-bit 8 or 4")
    if options.exchange != "alltoallv" and options.table_kernel != "torch":
        raise OptionError(f"--exchange {options.exchange} wants --table-kernel torch: those rows it pools alike")
    if options.exchange != "alltoallv" and options.dist_backend != "bls":
        raise OptionError(f"--exchange {options.exchange} wants --dist-backend bls: others have collectives only")
    if options.device == "cuda":
        _check_gpu(options)
    elif options.gpu_memory or options.tf32 or not options.cuda_graphs:
        raise OptionError("--gpu-memory, --tf32 and --cuda-graphs want --device cuda")
    if options.predictions and not options.predictions.endswith((".npy", ".csv")):
        raise OptionError(f"--predictions {options.predictions}: the name must end in .npy or .csv")


def _check_gpu(options: Options) -> None:
    """What there is not on a GPU. Raises OptionError."""
    for flag, value, served in (
        ("--input", options.input, "replicated"),
        ("--exchange", options.exchange, "alltoallv"),
        ("--dist-backend", options.dist_backend, "bls"),
        ("--table-kernel", options.table_kernel, "torch"),
        ("--dense-kernel", options.dense_kernel, "torch"),
    ):
        if value != served:
            raise OptionError(f"{flag} {value} does not go with --device cuda: only {served} does")
