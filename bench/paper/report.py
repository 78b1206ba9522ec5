"""A run's report: on the terminal, as one self-contained HTML file, and in a Markdown document."""

from __future__ import annotations

import base64
import html
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import delay_report, report
from bench.environment import disturbed
from bench.paper import figures, findings, goals, tables
from bench.paper.findings import Finding
from bench.paper.folder import Folder, Part
from bench.paper.goals import served
from bench.publish import replaced
from bench.results import Results
from bench.table import Table, console

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0 } td, th { padding: .15em .7em; text-align: right }
td.l, th.l { text-align: left } tr:nth-child(even) { background: #f5f5f5 } th { border-bottom: 1px solid #888 }
.note { color: #666; font-size: 13px } .claim { color: #555; font-style: italic } img { max-width: 100% }
div.wide { overflow-x: auto } .NOT { color: #b00020; font-weight: bold }
"""
_PAGE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>blsrdma: the experiments</title>
<style>{style}</style></head><body><h1>blsrdma: the experiments</h1>{body}</body></html>
"""


@dataclass
class Report:
    """What there is to say."""

    command: str
    about: list[str]
    goals: list[goals.Goal]
    findings: list[Finding]
    not_better: list[str]
    tables: list[Table]
    figures: list[str]
    headline: str


def publish(
    parts: Mapping[str, Part], failures: Mapping[str, str], absent: Mapping[str, str], folder: Folder,
    documents: Sequence[Path], command: str,
) -> None:  # fmt: skip
    """Print the summary; write figures, report.html and, where asked, a document."""
    drawn = figures.draw(parts, folder.path / "figures")
    made = Report(
        command, _about(parts, failures, absent), goals.goals(parts), findings.findings(parts),
        findings.not_better(parts), _tables(parts), drawn, findings.headline(parts),
    )  # fmt: skip
    (folder.path / "report.html").write_text(_page(made, folder.path / "figures"))
    out = console()
    for line in made.about:
        out.print(line, highlight=False)
    for one in made.findings:
        out.print()
        out.print(one.title, style="bold", highlight=False)
        out.print(f"Claim: {one.claim}", highlight=False)
        out.print(f"Seen: {one.seen}", highlight=False)
    out.print()
    out.print("Not better:" if made.not_better else "Nothing was worse than a peer.", highlight=False)
    for line in made.not_better:
        out.print(f"  {line}", highlight=False)
    out.print()
    tables.of_goals(made.goals).print(out)
    out.print()
    out.print(f"{folder.path / 'report.html'} has everything.", highlight=False)
    for document in documents:
        _write(made, document, folder.path / "figures")


def _write(made: Report, document: Path, drawn: Path) -> None:
    """The blocks that a document has."""
    text = document.read_text()
    if "<!-- bench paper-headline -->" in text:
        text = replaced(text, "paper-headline", textwrap.fill(made.headline, 125, break_on_hyphens=False))
    if "<!-- bench paper -->" in text:
        pictures = document.parent / document.stem
        pictures.mkdir(exist_ok=True)
        for name in made.figures:
            shutil.copy(drawn / f"{name}.png", pictures / f"{name}.png")
        text = replaced(text, "paper", _markdown(made, pictures.name))
    document.write_text(text)


def _about(parts: Mapping[str, Part], failures: Mapping[str, str], absent: Mapping[str, str]) -> list[str]:
    """Where and when, how disturbed, and what is not there."""
    results = [Results.of_values(part.values["results"]) for part in parts.values() if "results" in part.values]
    measurements = [m for one in results for m in one.measurements]
    runs = [run for one in served(parts).values() for run in one.runs]
    others = [*(value for m in measurements for value in m.others), *(run["others"] for run in runs)]
    stolen = [*(value for m in measurements for value in m.stolen), *(run["stolen"] for run in runs)]
    again = sum(len(m.disturbed) for m in measurements) + sum(
        len(one.part.values.get("again", [])) for one in served(parts).values()
    )
    lines = []
    if others:
        lines += disturbed(median(others))
        lines.append(
            f"cores that others kept busy: median {median(others):.2f}, at most {max(others):.2f}, over {len(others)} "
            f"blocks; taken by the hypervisor: at most {max(stolen):.2f}; {again} disturbed blocks measured again"
        )
    lines += [f"left out: dlrm-{name}: {why}" for name, why in absent.items()]
    skipped = {(what, why.splitlines()[0]): name for name, part in parts.items() for what, why in part.skipped.items()}
    lines += [f"left out, of {name} and others: {what}: {why}" for (what, why), name in skipped.items()]
    lines += [f"FAILED: {name}: {why}" for name, why in failures.items()]
    lines.append("seconds: " + ", ".join(f"{name} {part.seconds:.0f}" for name, part in parts.items()))
    if results:
        return [*(line for line in report.about(results[0]) if "other processes" not in line), *lines]
    e = next(iter(parts.values())).environment
    return [f"{e['date']}, commit {e['commit']}, {e['cpu']}, {e['cores']} cores", *lines]


def _tables(parts: Mapping[str, Part]) -> list[Table]:
    found: list[Table] = []
    if part := parts.get("synthetic"):
        results = Results.of_values(part.values["results"])
        found += delay_report.tables(results)
        found.append(tables.intervals_of(results))
    for one in served(parts).values():
        found.append(tables.throughput(one))
        if "capacity" in one.part.values:
            found.append(tables.latency(one))
    if part := parts.get("where"):
        results = Results.of_values(part.values["results"])
        cost = min(m.summary.median for m in results.measurements if m.case.delay == "none") / 1e9
        found += [tables.check(results), *tables.maps(part), tables.advised(cost)]
    found.append(tables.exactness(parts))
    return found


def _markdown(made: Report, pictures: str) -> str:
    lines = [f"`{made.command}`", "", *(f"- {line}" for line in made.about), ""]
    lines += ["## Goals, reached and not", "", tables.of_goals(made.goals).markdown()]
    lines += ["## Findings", ""]
    for one in made.findings:
        lines += [f"**{one.title}.** *The claim:* {one.claim} *Seen:* {one.seen}", ""]
    lines += ["## What was not better", ""]
    lines += [f"- {line}" for line in made.not_better] or ["Nothing was worse than a peer."]
    lines += [""]
    for name in made.figures:
        lines += [f"![{figures.CAPTIONS[name]}]({pictures}/{name}.png)", "", figures.CAPTIONS[name], ""]
    lines += ["## Tables", "", *(table.markdown() for table in made.tables)]
    return "\n".join(lines)


def _page(made: Report, folder: Path) -> str:
    body = [f"<p><code>{html.escape(made.command)}</code></p>", _list(made.about), "<h2>Goals</h2>"]
    body.append(_table(tables.of_goals(made.goals)))
    body.append("<h2>Findings</h2>")
    for one in made.findings:
        title, claim, seen = (html.escape(text) for text in (one.title, one.claim, one.seen))
        body.append(f'<h3>{title}</h3><p class="claim">The claim: {claim}</p><p>{seen}</p>')
    body.append("<h2>What was not better</h2>")
    body.append(_list(made.not_better) if made.not_better else "<p>Nothing was worse than a peer.</p>")
    for name in made.figures:
        picture = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        caption = html.escape(figures.CAPTIONS[name])
        body.append(f'<h2>{caption}</h2><img alt="{caption}" src="data:image/svg+xml;base64,{picture}">')
    body.append("<h2>Tables</h2>")
    body += [_table(table) for table in made.tables]
    return _PAGE.format(style=_STYLE, body="\n".join(body))


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _table(table: Table) -> str:
    kinds = [' class="l"' if column.startswith("<") else "" for column in table.columns]

    def row(cells: list[str], tag: str) -> str:
        found = []
        for cell, kind in zip(cells, kinds, strict=True):
            mark = kind.replace('"l"', '"l NOT"') if cell.startswith("NOT ") else kind
            found.append(f"<{tag}{mark}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    lines = [row([column.removeprefix("<") for column in table.columns], "th")]
    lines += [row(list(cells), "td") for cells in table.rows]
    notes = "".join(f'<div class="note">{html.escape(note)}</div>' for note in table.notes)
    return f'<h3>{html.escape(table.title)}</h3><div class="wide"><table>{"".join(lines)}</table></div>{notes}'
