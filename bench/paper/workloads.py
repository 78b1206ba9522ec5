"""What the model is fed with: generated data, and real ones where their files are given."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

_MODEL = "--arch-sparse-feature-size 16 --arch-mlp-top 512-256-1".split()
_BATCH = "256"
NAMES = ("balanced", "skewed", "criteo", "ali-ccp", "meta")


@dataclass(frozen=True)
class Workload:
    """`better`: flags of a placement that balances it; `first`: has all delays, and an open loop."""

    name: str
    about: str
    flags: list[str]
    better: list[str]
    first: bool = False


BALANCED = Workload(
    "balanced", "generated, Criteo-shaped: 26 tables of up to 10,000 rows, one row each, contiguous placement",
    [*_MODEL, "--mini-batch-size", _BATCH, "--data-generation", "sample"], [], first=True,
)  # fmt: skip
SKEWED = Workload(
    "skewed", "24 tables of 20,000 rows, dim 64, bags of 30 by Zipf's law (s 1.05), 21 of them at rank 0; small MLPs",
    [*"--arch-sparse-feature-size 64 --arch-mlp-bot 13-64-64 --arch-mlp-top 64-1 --placement worst".split(),
     "--mini-batch-size", _BATCH, "--arch-embedding-size", "-".join(["20000"] * 24), "--rand-data-dist",
     "zipf:s=1.05", "--num-indices-per-lookup", "30", "--num-indices-per-lookup-fixed"],
    ["--placement", "greedy"],
)  # fmt: skip


def workloads(data: Path | None, made: Path) -> tuple[list[Workload], dict[str, str]]:
    """All there are, and why others are not. data: a folder of real files; made: where a file may be written."""
    found, absent = [BALANCED, SKEWED], {}
    for name, files, make in (
        ("criteo", ["criteo_kaggle_first8000.tsv.gz"], _criteo),
        ("ali-ccp", ["aliccp_multihot_10.txt.gz"], _ali_ccp),
        ("meta", ["meta_reuse_low_500K.txt.gz", "meta_reuse_medium_500K.txt.gz"], _meta),
    ):
        paths = [data / file for file in files] if data else []
        if paths and all(path.exists() for path in paths):
            found.append(make(paths, made))
        else:
            absent[name] = f"{', '.join(files)}: not in --data" if data else "no --data, and no BLSRDMA_TEST_DATA"
    return found, absent


def _criteo(paths: list[Path], _made: Path) -> Workload:
    flags = [*_MODEL, "--mini-batch-size", "64", "--raw-data-file", str(paths[0]), "--data-set", "kaggle"]
    return Workload("criteo", "the first 8,000 rows of Criteo Kaggle, contiguous placement", flags, [])


def _ali_ccp(paths: list[Path], made: Path) -> Workload:
    rows = gzip.decompress(paths[0].read_bytes()).rstrip(b"\n") + b"\n"
    path = made / "aliccp_multihot_repeated.txt"
    made.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rows * 320)
    flags = [*_MODEL, "--mini-batch-size", "32", "--raw-data-file", str(path), "--data-set", "aliccp-multihot"]
    return Workload("ali-ccp", "10 rows of Ali-CCP over and over: bags of up to hundreds of rows", flags,
                    ["--placement", "greedy"])  # fmt: skip


def _meta(paths: list[Path], _made: Path) -> Workload:
    files = ",".join(str(path) for path in [*paths, *paths])
    flags = [*_MODEL, "--mini-batch-size", _BATCH, "--raw-data-file", files, "--data-set", "trace",
             "--num-indices-per-lookup", "8", "--num-indices-per-lookup-fixed"]  # fmt: skip
    about = "Meta's recorded accesses of low and of medium reuse, each as two tables of 500,000 rows, bags of 8"
    return Workload("meta", about, flags, [])
