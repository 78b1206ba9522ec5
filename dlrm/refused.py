"""The reference's flags that are not served: each is refused with a sentence on what to do instead."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

_TRAINING = "this program only does inference; leave it out"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("--md-flag", "--md-threshold", "--md-temperature", "--md-round-dims"), "MD embeddings: use plain ones"
    ),
    **dict.fromkeys(
        ("--qr-flag", "--qr-threshold", "--qr-operation", "--qr-collisions"), "QR embeddings: use plain ones"
    ),
    "--weighted-pooling": "weights that are learned; per-sample weights come with a Batch (dlrm.serve); leave it out",
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
            "--mlperf-grad-accum-iter",
        ),
        _TRAINING,
    ),
    **dict.fromkeys(("--use-gpu", "--use-fbgemm-gpu"), "say --device cuda"),
    "--local_rank": "torchrun's environment says it; leave it out",
    "--quantize-mlp-with-bit": "the MLPs are fp32; leave it out (tables: --quantize-emb-with-bit)",
    **dict.fromkeys(
        ("--memory-map", "--mlperf-bin-loader", "--mlperf-bin-shuffle"),
        "files are told apart by themselves, and mapped or streamed; leave it out",
    ),
    "--data-sub-sample-rate": "every sample is predicted; leave it out",
    "--data-randomize": "samples are predicted in the order of the file; leave it out",
    **dict.fromkeys(("--num-workers", "--test-num-workers"), "the ranks read for themselves; leave it out"),
    "--dataset-multiprocessing": "files are read as they are, in a stream; leave it out",
    "--activation-function": "layers have ReLU between them and a sigmoid at the end; leave it out",
    "--data-size": "say it in batches: --num-batches and --mini-batch-size",
    **dict.fromkeys(("--rand-data-min", "--rand-data-max"), "rows are drawn from whole tables; leave it out"),
    **dict.fromkeys(("--rand-data-mu", "--rand-data-sigma"), "say --rand-data-dist gaussian:mu=20,sigma=15"),
    "--data-trace-enable-padding": "bags keep the lengths that were drawn; leave it out",
    "--print-precision": "--predictions writes all digits; leave it out",
    "--print-wall-time": "use --print-time, or --json for all times",
    "--debug-mode": "use --debug",
    "--enable-profiling": "use --profile, or BLSRDMA_TRACE for a timeline",
    "--tensor-board-filename": "use --json",
}


class Refuse(argparse.Action):
    """A flag that ends the program with a reason."""

    def __init__(self, option_strings: Sequence[str], *, reason: str, **_: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs="?", help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )
        self.reason = reason

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]}: {self.reason}")
