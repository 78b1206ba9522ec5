"""The command line: every flag with its help, and the reference's flags that are refused."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from dlrm.data import DEFAULT_MAX_IND_RANGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DESCRIPTION = """\
Recommendation model (DLRM) inference over several ranks. Every rank owns some of the embedding tables; in each
iteration it looks its own tables up for the whole batch and sends every rank the pooled vectors of that rank's
samples. With --lag k a rank may be k iterations ahead of the slowest one, so that short delays on some ranks cost
the others nothing; results are the same, bit for bit, whatever the lag.
"""
_EPILOG = """\
examples:
  python -m dlrm --ranks 4 --lag 3 --verify             the embedded sample, checked against a single process
  python -m dlrm --ranks 4 --lag 4 --delay exp:p=0.1,mean=10ms --json out.json
  torchrun --nproc-per-node 4 -m dlrm --lag 3           the same with ranks started by torchrun
  python -m dlrm --ranks 2 --raw-data-file train.txt --num-batches 100 --predictions clicks.csv
  python -m dlrm --arch-embedding-size 1000-1000-50 --arch-mlp-bot 4-16-8 --arch-mlp-top 32-1 \\
                 --arch-sparse-feature-size 8 --num-indices-per-lookup 4

Under --dense-block 0 the shapes of the dense work, and so the last bits of the logits, depend on the number of
ranks; give --dense-block 32 to have the same bits on any number of ranks. BLSRDMA_* and UCX_* variables choose and
tune the transport.
"""

# Flags of the reference that are not served, and what to do instead.
_TRAINING = "this program only does inference; leave it out"
_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("--md-flag", "--md-threshold", "--md-temperature", "--md-round-dims"), "MD embeddings: use plain ones"
    ),
    **dict.fromkeys(
        ("--qr-flag", "--qr-threshold", "--qr-operation", "--qr-collisions"), "QR embeddings: use plain ones"
    ),
    **dict.fromkeys(("--weighted-pooling",), "pooling is a plain sum; leave it out"),
    **dict.fromkeys(("--save-onnx", "--plot-compute-graph"), "no graph is exported; leave it out"),
    **dict.fromkeys(
        (
            "--nepochs",
            "--learning-rate",
            "--optimizer",
            "--loss-function",
            "--loss-weights",
            "--round-targets",
            "--save-model",
            "--test-freq",
            "--lr-num-warmup-steps",
            "--lr-decay-start-step",
            "--lr-num-decay-steps",
            "--sync-dense-params",
            "--mlperf-logging",
            "--mlperf-acc-threshold",
            "--mlperf-auc-threshold",
        ),
        _TRAINING,
    ),
    **dict.fromkeys(("--use-gpu", "--use-fbgemm-gpu"), "the model runs on the CPU; leave it out"),
    **dict.fromkeys(("--dist-backend", "--local_rank"), "ranks always talk through blsrdma; leave it out"),
    **dict.fromkeys(("--quantize-mlp-with-bit", "--quantize-emb-with-bit"), "not served yet: parameters are fp32"),
    **dict.fromkeys(
        ("--processed-data-file", "--memory-map", "--mlperf-bin-loader"), "not served yet: use --raw-data-file"
    ),
    **dict.fromkeys(("--data-set", "--data-trace-file", "--data-sub-sample-rate"), "not served: see --data-generation"),
    **dict.fromkeys(("--loss-threshold", "--test-mini-batch-size", "--print-time"), "not served yet; leave it out"),
}


def parser() -> argparse.ArgumentParser:
    """The parser; its defaults are None where they depend on other flags (see `options.parse`)."""
    whole = argparse.ArgumentParser(
        prog="python -m dlrm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _model_flags(whole.add_argument_group("model (flags of the reference)").add_argument)
    _data_flags(whole.add_argument_group("data (flags of the reference)").add_argument)
    _run_flags(whole.add_argument_group("run").add_argument)
    _output_flags(whole.add_argument_group("output").add_argument)
    for flag, reason in _REFUSED.items():
        whole.add_argument(flag, action=_Refuse, reason=reason)
    return whole


def _model_flags(add: Callable[..., Any]) -> None:
    add("--arch-sparse-feature-size", type=_at_least(1), default=16, metavar="DIM", help="width of an embedding (16)")
    add("--arch-embedding-size", type=_widths, metavar="A-B-C", help="rows of each table (see --max-ind-range)")
    add(
        "--arch-mlp-bot",
        type=_widths,
        metavar="A-B-C",
        help="widths of the bottom MLP, from the dense features to DIM (13-512-256-64-DIM)",
    )
    add(
        "--arch-mlp-top",
        type=_widths,
        default=(512, 256, 1),
        metavar="A-B-1",
        help="widths of the top MLP after its input, whose width follows from the interaction (512-256-1)",
    )
    add(
        "--arch-interaction-op",
        choices=("dot", "cat"),
        default="dot",
        help="pairwise dot products, or all vectors side by side (dot)",
    )
    add("--arch-interaction-itself", action="store_true", help="dot: the product of each vector with itself, too")
    add(
        "--load-model",
        metavar="FILE",
        help="a checkpoint of the reference, single process (weights drawn from the seed)",
    )
    add(
        "--numpy-rand-seed",
        type=_at_least(0),
        default=123,
        metavar="SEED",
        help="seed of weights and of generated data (123)",
    )
    add("--inference-only", action="store_true", help="accepted; there is nothing else")


def _data_flags(add: Callable[..., Any]) -> None:
    add(
        "--data-generation",
        choices=("sample", "random", "dataset"),
        help="sample: generated, Criteo-shaped, 8192 samples with labels, over again where more are wanted; random: "
        "uniform, as in the reference; dataset: --raw-data-file. Chosen by the other flags where it is not given: "
        "dataset with a file, random with --arch-embedding-size or --num-indices-per-lookup, else sample",
    )
    add("--raw-data-file", default="", metavar="FILE", help="Criteo format, plain or gzip")
    add(
        "--max-ind-range",
        type=_at_least(-1),
        default=DEFAULT_MAX_IND_RANGE,
        metavar="N",
        help="category ids of a file are taken modulo N, and tables have Criteo Kaggle's rows but no more than N; "
        f"-1: no limit, 33.8 M rows ({DEFAULT_MAX_IND_RANGE})",
    )
    add(
        "--mini-batch-size",
        type=_at_least(1),
        default=128,
        metavar="B",
        help="samples in a batch, over all ranks (128)",
    )
    add("--num-batches", type=_at_least(0), default=0, metavar="N", help="batches; 0: all there are (0)")
    add(
        "--num-indices-per-lookup",
        type=_at_least(1),
        metavar="N",
        help="random data: rows in a bag, at most (10)",
    )
    add(
        "--num-indices-per-lookup-fixed",
        type=_truth,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="random data: exactly N rows in a bag",
    )


def _run_flags(add: Callable[..., Any]) -> None:
    add("--ranks", type=_at_least(1), metavar="P", help="start P ranks here (1); under torchrun leave it out")
    add(
        "--lag",
        type=_at_least(0),
        default=0,
        metavar="K",
        help="iterations a rank may be ahead of the slowest; 0: synchronous (0)",
    )
    add(
        "--dense-block",
        type=_at_least(0),
        default=0,
        metavar="B",
        help="dense work in blocks of B samples, so that bits do not depend on the number of ranks; 0: the whole "
        "slice at once (0)",
    )
    add("--threads", type=_at_least(1), default=1, metavar="N", help="threads of torch on each rank (1)")
    add(
        "--delay",
        default="none",
        metavar="PLAN",
        help="injected stalls: exp:p=0.1,mean=2ms (each rank, in each iteration, with probability p, for an "
        "exponential time) or rotate:every=10,time=10ms (a straggler going round)",
    )
    add("--delay-seed", type=_at_least(0), default=0, metavar="SEED", help="seed of --delay exp (0)")
    add(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds any wait for another rank may take; inf: for ever (60)",
    )
    add(
        "--window-bytes",
        type=_at_least(1),
        metavar="N",
        help="room for one message from one rank to another (the largest there will be)",
    )


def _output_flags(add: Callable[..., Any]) -> None:
    add(
        "--verify",
        action="store_true",
        help="recompute everything in a single process and compare bits; status 1 if any differs",
    )
    add(
        "--digest",
        action="store_true",
        help="SHA-256 of pooled vectors and of logits (before the sigmoid), in sample order; keeps the pooled vectors "
        "of the run in memory (implied by --verify)",
    )
    add("--predictions", metavar="FILE", help="write click probabilities in sample order: .npy or .csv")
    add("--json", metavar="FILE", help="write all measurements; -: to stdout, in place of the table")
    add("--print-freq", type=_at_least(0), default=0, metavar="N", help="log progress every N batches; 0: never (0)")
    add("--debug", action="store_true", help="whole tracebacks (as with BLSRDMA_DEBUG=1)")


class _Refuse(argparse.Action):
    """A flag that ends the program with a reason."""

    def __init__(self, option_strings: Sequence[str], *, reason: str, **_: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs="?", help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )
        self.reason = reason

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]}: {self.reason}")


def _at_least(lowest: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        return value

    return number


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(word) for word in text.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 512-256-1") from None
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number less than 1")
    return widths


def _truth(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("1", "true", "yes")


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return value
