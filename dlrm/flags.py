"""The command line: every flag with its help (those of the reference that are not served: see `refused`)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dlrm.data import DATA_SETS, DEFAULT_MAX_IND_RANGE
from dlrm.refused import REFUSED, Refuse
from dlrm.values import at_least, positive, size, truth, widths

if TYPE_CHECKING:
    from collections.abc import Callable

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
  python -m dlrm --ranks 2 --raw-data-file rows.tsv --load-model model.pt --arch-sparse-feature-size 8 \\
                 --arch-mlp-bot 13-64-8 --arch-mlp-top 64-1 --first-sample 6400      a model of `python -m dlrm.fit`
  python -m dlrm --ranks 4 --max-ind-range -1 --placement greedy --replicate-below 1000 --plan
  python -m dlrm --ranks 2 --lag 2 --dist-backend gloo  the same over gloo, or mpi, or nccl
  python -m dlrm --ranks 2 --lag 2 --device cuda --verify
  python -m dlrm --ranks 2 --input sharded --arrival-rate 200 --num-batches 1000 --lag 2
  python -m dlrm --arch-embedding-size 1000-1000-50 --arch-mlp-bot 4-16-8 --arch-mlp-top 32-1 \\
                 --arch-sparse-feature-size 8 --num-indices-per-lookup 4

Under --dense-block 0 the shapes of the dense work, and so the last bits of the logits, depend on the number of
ranks; give --dense-block 32 to have the same bits on any number of ranks. BLSRDMA_* and UCX_* variables choose and
tune the transport.
"""


def parser() -> argparse.ArgumentParser:
    """The parser; its defaults are None where they depend on other flags (see `options.parse`)."""
    whole = argparse.ArgumentParser(
        prog="python -m dlrm",
        usage="%(prog)s [FLAG ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _model_flags(whole.add_argument_group("model (flags of the reference)").add_argument)
    _data_flags(whole.add_argument_group("data (flags of the reference)").add_argument)
    _table_flags(whole.add_argument_group("tables and where they are").add_argument)
    _run_flags(whole.add_argument_group("run").add_argument)
    _serving_flags(whole.add_argument_group("serving").add_argument)
    _gpu_flags(whole.add_argument_group("GPUs").add_argument)
    _output_flags(whole.add_argument_group("output").add_argument)
    for flag, reason in REFUSED.items():
        whole.add_argument(flag, action=Refuse, reason=reason)
    return whole


def _model_flags(add: Callable[..., Any]) -> None:
    add("--arch-sparse-feature-size", type=at_least(1), default=16, metavar="DIM", help="width of an embedding (16)")
    add("--arch-embedding-size", type=widths, metavar="A-B-C", help="rows of each table (see --max-ind-range)")
    add(
        "--arch-mlp-bot",
        type=widths,
        metavar="A-B-C",
        help="widths of the bottom MLP, from the dense features to DIM (13-512-256-64-DIM)",
    )
    add(
        "--arch-mlp-top",
        type=widths,
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
        metavar="PATH",
        help="a checkpoint: the reference's file; those of its distributed runs, in rank order, a.pt,b.pt or a folder; "
        "safetensors; a folder written by `python -m dlrm.convert` (weights drawn from the seed)",
    )
    add(
        "--numpy-rand-seed",
        type=at_least(0),
        default=123,
        metavar="SEED",
        help="seed of weights and of generated data (123)",
    )
    add(
        "--loss-threshold",
        type=float,
        default=0.0,
        metavar="T",
        help="keep probabilities between T and 1 - T; 0: do not (0)",
    )
    add("--inference-only", action="store_true", help="accepted; there is nothing else")


def _data_flags(add: Callable[..., Any]) -> None:
    add(
        "--data-generation",
        choices=("sample", "random", "synthetic", "dataset"),
        help="sample: generated, Criteo-shaped, 8192 samples with labels, over again where more are wanted; random: by "
        "--rand-data-dist; synthetic: by the stack distances of --data-trace-file; dataset: --raw-data-file or "
        "--processed-data-file. Chosen by the other flags where it is not given",
    )
    add(
        "--data-set",
        choices=DATA_SETS,
        default="auto",
        help="what a file holds: kaggle, terabyte: Criteo's TSV (plain or gzip), the reference's npz, MLPerf's binary "
        "or npy files; aliccp: CSV, raw or multi-hot text; trace: one row number a line. auto: by its name (auto)",
    )
    add("--raw-data-file", default="", metavar="PATH", help="a file, or folder, of samples; see --data-set")
    add("--processed-data-file", default="", metavar="PATH", help="the same; the reference's flag for npz and binary")
    add(
        "--data-trace-file",
        default="",
        metavar="FILE",
        help="synthetic: stack distances as the reference writes them, a file for each table where the name has a j "
        "(dist_emb_j.log)",
    )
    add(
        "--max-ind-range",
        type=at_least(-1),
        default=DEFAULT_MAX_IND_RANGE,
        metavar="N",
        help="category ids of a file are taken modulo N, and tables have Criteo Kaggle's rows but no more than N; "
        f"-1: no limit, 33.8 M rows ({DEFAULT_MAX_IND_RANGE})",
    )
    add(
        "--mini-batch-size",
        type=at_least(1),
        default=128,
        metavar="B",
        help="samples in a batch, over all ranks (128)",
    )
    add("--test-mini-batch-size", type=at_least(-1), default=-1, metavar="B", help="the same where it is above 0 (-1)")
    add("--num-batches", type=at_least(0), default=0, metavar="N", help="batches; 0: all there are (0)")
    add("--first-sample", type=at_least(0), default=0, metavar="N", help="leave the first N samples out (0)")
    add(
        "--num-indices-per-lookup",
        type=widths,
        metavar="N",
        help="generated data: rows in a bag, at most; N-N-N: of each table; mlperf: MLPerf v2's 26 (10)",
    )
    add(
        "--num-indices-per-lookup-fixed",
        type=truth,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="generated data: exactly N rows in a bag",
    )
    add(
        "--rand-data-dist",
        default="uniform",
        metavar="DIST",
        help="random data: uniform, gaussian[:mu=,sigma=], zipf:s=0.9[,q=0][,hot=8,share=0.2] (Zipf-Mandelbrot; hot "
        "rows that take a share of their own), pareto[:a=0.25] (rows that follow from the first of a bag, as in MLPerf "
        "v2) (uniform)",
    )


def _table_flags(add: Callable[..., Any]) -> None:
    add("--pooling", choices=("sum", "mean"), default="sum", help="how a bag becomes a vector (sum)")
    add(
        "--quantize-emb-with-bit",
        type=int,
        choices=(32, 16, 8, 4),
        default=32,
        help="how an element of a table is stored; 8 and 4: row-wise quantised (32)",
    )
    add(
        "--table-kernel",
        choices=("torch", "fbgemm"),
        default="torch",
        help="who pools: torch's bags, or for 8 and 4 bits FBGEMM's (pip install fbgemm-gpu-cpu) (torch)",
    )
    add(
        "--placement",
        default="contiguous",
        metavar="HOW",
        help="contiguous: blocks, as the reference; greedy: by bytes and lookups; worst: all but the lightest tables "
        "at rank 0; or a JSON file (contiguous)",
    )
    add(
        "--row-wise-above",
        type=at_least(0),
        default=0,
        metavar="N",
        help="cut tables of more than N rows by rows over all ranks; 0: none (0)",
    )
    add(
        "--replicate-below",
        type=at_least(0),
        default=0,
        metavar="N",
        help="tables of at most N rows are on every rank, and not sent; 0: none (0)",
    )
    add("--plan", action="store_true", help="show what each rank owns, its memory, and the predicted lookup times")


def _run_flags(add: Callable[..., Any]) -> None:
    add("--ranks", type=at_least(1), metavar="P", help="start P ranks here (1); under torchrun leave it out")
    add(
        "--lag",
        type=at_least(0),
        default=0,
        metavar="K",
        help="iterations a rank may be ahead of the slowest; 0: synchronous (0)",
    )
    add(
        "--dense-block",
        type=at_least(0),
        default=0,
        metavar="B",
        help="dense work in blocks of B samples that begin at multiples of B, so that bits do not depend on the number "
        "of ranks; 0: a rank's samples in even blocks of at most 256 (0)",
    )
    add(
        "--dense-kernel",
        choices=("torch", "onednn"),
        default="torch",
        help="who multiplies the MLPs: torch's linear layers (MKL), or oneDNN, about twice as fast on AMD (torch)",
    )
    add("--threads", type=at_least(1), default=1, metavar="N", help="threads of torch on each rank (1)")
    add(
        "--delay",
        default="none",
        metavar="PLAN",
        help="injected stalls: exp:p=0.1,mean=2ms (each rank, in each iteration, with probability p, for an "
        "exponential time), lognormal:p=0.1,median=1ms,sigma=1, rotate:every=10,time=10ms (a straggler going round), "
        "slow:time=1ms (the last rank, always), one:p=0.02,time=50ms (the last rank, at random), "
        "pause:every=200,time=20ms (each rank once in 200 iterations)",
    )
    add("--delay-seed", type=at_least(0), default=0, metavar="SEED", help="seed of --delay (0)")
    add(
        "--timeout",
        type=positive,
        default=60.0,
        metavar="S",
        help="seconds any wait for another rank may take; inf: for ever (60)",
    )
    add(
        "--window-bytes",
        type=at_least(1),
        metavar="N",
        help="room for one message from one rank to another; larger ones take longer (the largest there will be)",
    )


def _serving_flags(add: Callable[..., Any]) -> None:
    add(
        "--input",
        choices=("replicated", "sharded"),
        default="replicated",
        help="replicated: every rank reads the whole batch, as the reference; sharded: each rank has its own samples, "
        "and the indices travel, too (replicated)",
    )
    add(
        "--exchange",
        choices=("alltoallv", "put", "get", "auto"),
        default="alltoallv",
        help="alltoallv: a collective of all ranks in every iteration; put: each rank asks the owners, who pool and "
        "answer apart from their own loops; get: it reads the rows it needs out of the owners' memory, and pools them; "
        "auto: get where the owner's memory is mapped here and that costs less, as measured at the start, else put "
        "(alltoallv)",
    )
    add(
        "--arrival-rate",
        type=positive,
        metavar="R",
        help="open loop: R batches arrive in a second, and latency counts from arrival (closed loop: the next batch is "
        "there when the rank is)",
    )
    add("--arrival", choices=("poisson", "fixed"), default="poisson", help="gaps between arrivals (poisson)")
    add(
        "--quiet",
        default="none",
        metavar="R:FROM:LENGTH",
        help="open loop, sharded: nothing arrives at rank R for a while, such as 1:2s:1s (none)",
    )
    add(
        "--dist-backend",
        choices=("", "bls", "gloo", "mpi", "nccl", "torch-bls"),
        default="bls",
        metavar="NAME",
        help="who carries the pooled vectors: bls, an exchange of blsrdma; or for comparison an all-to-all of "
        "torch.distributed (gloo, nccl, or torch-bls: blsrdma through torch) or mpi (mpi4py), with lag + 1 operations "
        "in flight (bls)",
    )


def _gpu_flags(add: Callable[..., Any]) -> None:
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tables are, and are pooled, and the MLPs are multiplied; cuda: every rank on a GPU of its host, "
        "LOCAL_RANK modulo their number; --verify then compares pooled vectors bit by bit, and logits with float64 "
        "within a bound of its rounding errors (cpu)",
    )
    add(
        "--gpu-memory",
        type=size,
        metavar="SIZE",
        help="GPU memory that a rank may take, such as 40G; of tables that do not fit the rows that are asked for most "
        "are there, the others in page-locked host memory (its share of what is free)",
    )
    add(
        "--cuda-graphs",
        type=truth,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="launch each MLP as one CUDA graph (true)",
    )
    add("--tf32", action="store_true", help="multiply the MLPs in TF32: faster, 10 bits of mantissa (fp32)")


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
    add(
        "--profile",
        action="store_true",
        help="processor time of each phase, too: what counts where ranks share cores, and take turns in any phase",
    )
    add("--predictions", metavar="FILE", help="write click probabilities in sample order: .npy or .csv")
    add("--json", metavar="FILE", help="write all measurements; -: to stdout, in place of the table")
    add("--print-freq", type=at_least(-1), default=0, metavar="N", help="log progress every N batches; 0: never (0)")
    add("--print-time", action="store_true", help="with milliseconds per batch in that log")
    add("--debug", action="store_true", help="whole tracebacks (as with BLSRDMA_DEBUG=1)")
