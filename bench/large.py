"""`python -m bench large`: what a message larger than its window costs, and what a checksum does."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from bench import environment
from bench.cases import bytes_label
from bench.large_rank import WAYS
from bench.launchers import TRANSPORTS, Interpreters, plan
from bench.publish import add_options, publish
from bench.table import Table, microseconds
from bench.team import Team, TeamFailed
from blsrdma.settings import parse_size

ABOUT = """\
Two ranks of this machine send each other the same bytes at the same time, at lag 0, copied out at the receiver: as a
message that fits its window; as one of 3 and of 16 windows, which the receiver pulls; cut into 3 and 16 messages that
fit; and with every message checked (checksum=True).
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser("large", help="messages larger than a window, and checksums", description=ABOUT)
    parser.set_defaults(run=run)
    parser.add_argument("--bytes", nargs="+", default=["4K", "64K", "1M", "16M"], help="(4K 64K 1M 16M)")
    parser.add_argument("--transports", nargs="+", choices=list(TRANSPORTS), default=["default", "puts"],
                        help="(default puts)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.05, help="of one way in one repetition (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_options(parser, "large")


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when ranks failed."""
    facts, tables, raw = environment.describe(), [], []
    for transport in options.transports:
        table = Table(
            f"{transport}: µs for so many bytes each way, 2 ranks",
            ["bytes", *(way.name for way in WAYS)],
            notes=["Medians ± half the interquartile range."],
        )
        team = Team("bls", 2, plan("bls", 2, environment.cores(), Interpreters(), transport))
        try:
            team.ready()
            for text in options.bytes:
                size = parse_size(text)
                replies = team.call("run", function="bench.large_rank:run", size=size, repeat=options.repeat,
                                    seconds=options.seconds, limit=300)  # fmt: skip
                table.rows.append([bytes_label(text), *(_cell(replies[0]["samples"][way.name]) for way in WAYS)])
                raw.append({"transport": transport, "bytes": size, **replies[0]})
        except TeamFailed as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            team.close()
        table.notes.append(f"Large messages: {', '.join(raw[-1]['large'])}.")
        tables.append(table)
    about = [*environment.disturbed(facts["busy_before"]),
             f"{facts['date']}, commit {facts['commit']}, {facts['cpu']}, {facts['cores']} cores",
             "every way's first messages were compared with what was sent"]  # fmt: skip
    publish(options, f"python -m bench {' '.join(sys.argv[1:])}", about, tables)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": facts, "measurements": raw}, indent=1) + "\n")
    return 0


def _cell(samples: list[float]) -> str:
    ordered = sorted(samples)
    half = (ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]) / 2
    return f"{microseconds(median(ordered))} ±{half / median(ordered):.0%}"
