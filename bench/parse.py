"""`python -m bench parse`: how fast Criteo's text becomes batches, on one core, and in how much memory."""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench import environment
from bench.publish import add_options, publish
from bench.table import Table
from dlrm.data import criteo_rows
from dlrm.data.criteo import CriteoFile

ABOUT = """\
Write rows in Criteo's format, Kaggle's proportions of missing fields, to a temporary file, and read them as batches.
Reads are timed by processor time of the one process, and by the clock; the file is in the page cache.
"""
DISTINCT = 50_000  # rows that are written over and over
MISSING = 0.12  # of the fields
HASHES = 2**32


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "parse", help="rows per second of Criteo's text", description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--rows", type=int, default=1_000_000, help="(1,000,000)")
    parser.add_argument("--batch", type=int, default=2048, help="samples of a batch (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions (%(default)s)")
    add_options(parser, "parse")


def run(options: argparse.Namespace) -> int:
    """Exit status 0."""
    torch.set_num_threads(1)
    facts = environment.describe()
    table = Table(
        f"{options.rows:,} rows of Criteo's format, batches of {options.batch:,}",
        ["<file", "MB", "rows/s of processor time", "rows/s by the clock", "memory grew by"],
        notes=[
            "Medians of the repetitions; in brackets their range. Memory: the peak while reading, above that before."
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "train.txt"), Path(folder, "train.txt.gz")
        write(plain, options.rows)
        packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
        for path in (plain, packed):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
            before = _memory("VmRSS")
            found = [_read(path, options.rows, options.batch) for _ in range(options.repeat)]
            rates = [[options.rows / one[kind] for one in found] for kind in (0, 1)]
            cells = [f"{median(some):,.0f} ({min(some):,.0f}-{max(some):,.0f})" for some in rates]
            grown = f"{(_memory('VmHWM') - before) / 1e6:.1f} MB"
            table.rows.append([path.name, f"{path.stat().st_size / 1e6:.0f}", *cells, grown])
    about = [
        *environment.disturbed(facts["busy_before"]),
        f"{facts['date']}, commit {facts['commit']}, {facts['cpu']}; one thread; {options.repeat} repetitions",
    ]
    publish(options, f"python -m bench {' '.join(sys.argv[1:])}", about, [table])
    return 0


def write(path: Path, rows: int) -> None:
    """Rows in Criteo's format, DISTINCT of them different, the same every time."""
    random = np.random.default_rng(1)
    number = min(rows, DISTINCT)
    integers = random.lognormal(2, 2, (number, 13)).astype(np.int64)
    hashes = random.integers(0, HASHES, (number, 26))
    missing = random.random((number, 39)) < MISSING
    lines = []
    for own, ids, gone in zip(integers.tolist(), hashes.tolist(), missing.tolist(), strict=True):
        fields = [*map(str, own), *(f"{one:08x}" for one in ids)]
        lines.append("\t".join(["1", *("" if lost else text for text, lost in zip(fields, gone, strict=True))]) + "\n")
    whole = "".join(lines)
    with path.open("w", encoding="ascii") as stream:
        for _ in range(rows // number):
            stream.write(whole)
        stream.writelines(lines[: rows % number])


def _read(path: Path, rows: int, batch: int) -> tuple[float, float]:
    """Seconds of processor time, and by the clock. Raises ValueError where rows are lost."""
    began, cpu = time.monotonic(), time.process_time()
    found = sum(one.size for one in CriteoFile(path, criteo_rows(-1)).batches(batch, 0))
    spent = time.process_time() - cpu, time.monotonic() - began
    if found != rows:
        raise ValueError(f"{path.name} has {rows} rows, of which {found} were read")
    return spent


def _memory(name: str) -> int:
    """Bytes, as the system counts this process's."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(words[name].split()[0]) << 10
