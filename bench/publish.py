"""Where tables go: to the terminal, to standard output as Markdown, and into a block of a document, which is between
the lines `<!-- bench NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.table import Table, console


def add_options(parser: argparse.ArgumentParser, block: str) -> None:
    """--markdown and --document."""
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--document", metavar="FILE[:BLOCK]", type=_target(block),
                        help=f"put the tables into a block ({block}) of a Markdown file")  # fmt: skip


def publish(options: argparse.Namespace, command: str, about: Sequence[str], tables: Sequence[Table]) -> None:
    """Print the tables, under sentences about them, and put them where the options say."""
    text = "\n".join([f"`{command}`", "", *(f"- {line}" for line in about), "", *(t.markdown() for t in tables)])
    if options.markdown:
        print(text)
    else:
        out = console()
        for line in about:
            out.print(line, highlight=False)
        for table in tables:
            out.print()
            table.print(out)
    if getattr(options, "document", None):
        path, block = options.document
        path.write_text(replaced(path.read_text(), block, text))


def replaced(document: str, block: str, text: str) -> str:
    """The document with another block. Raises ValueError if it has no such block."""
    begin, end = f"<!-- bench {block} -->", f"<!-- end {block} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"the document needs one line {begin} and one line {end}")
    head, _, rest = document.partition(begin)
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2]}"


def _target(default: str) -> Callable[[str], tuple[Path, str]]:
    def parse(text: str) -> tuple[Path, str]:
        name, _, block = text.partition(":")
        block = block or default
        try:
            replaced(Path(name).read_text(), block, "")
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return Path(name), block

    return parse
