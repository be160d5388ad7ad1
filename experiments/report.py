"""docs/experiments.md: what stands between its markers, from the experiments' files and records.

``<!-- about: NAME: begin -->`` holds what the experiment's file says of itself,
``<!-- results: NAME: begin -->`` a table for every text, form and budget that has records; prose
beside them is written by hand.
"""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import table

from experiments import records
from experiments.catalogue import EXPERIMENTS
from experiments.frame import Answer, Experiment, answers
from experiments.records import RESULTS, ROOT, Record

DOCUMENT = ROOT / "docs" / "experiments.md"
PART = re.compile(r"<!-- (about|results): ([^\n]*): begin -->\n.*?<!-- \1: \2: end -->", re.S)


def document(text: str, results: Path = RESULTS) -> str:
    """The document with every part written anew. Raises ValueError for a part that is none."""
    begun = text.count(": begin -->")
    if len(PART.findall(text)) != begun:
        raise ValueError(f"{DOCUMENT.name}: {begun} parts begin, not all of them end")
    return PART.sub(lambda match: _part(match, results), text)


def _part(match: re.Match[str], results: Path) -> str:
    kind, named = match[1], match[2]
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    if named not in known:
        raise ValueError(f"{DOCUMENT.name}: no experiment for {kind}: {named}")
    experiment = known[named]
    if kind == "about":
        new = about(experiment)
    else:
        new = all_results(experiment, records.load(results / f"{named}.json"))
    return f"<!-- {kind}: {named}: begin -->\n{new}\n<!-- {kind}: {named}: end -->"


def all_results(experiment: Experiment, found: Sequence[Record]) -> str:
    """The tables of one experiment."""
    tables: dict[str, list[Record]] = {}
    for record in found:
        cell = record.cell
        tables.setdefault(f"### {cell.text}, {cell.form} form, equal {cell.budget}", []).append(
            record
        )
    shown = [f"{heading}\n\n{results_table(experiment, own)}" for heading, own in tables.items()]
    return "\n\n".join(shown) or "Not run yet."


def about(experiment: Experiment) -> str:
    """The heading, question, method and command that the experiment's file states."""
    heading, *said = experiment.document.strip().split("\n\n")
    named = [re.sub(r"^(Question|Method|Not here|Command):", r"**\1.**", each) for each in said]
    code = [re.sub(r"^(\*\*Command\.\*\*) (.*)", r"\1 `\2`", each) for each in named]
    return "\n\n".join([f"## {heading}", *code]).replace("``", "`")


def results_table(experiment: Experiment, found: Sequence[Record]) -> str:
    """The table of one experiment, what it was made on, and what is still missing.

    Raises ValueError for records of several texts or definitions of a task.
    """
    fingerprints = sorted({r.outcome.fingerprint for r in found})
    if len(fingerprints) > 1:
        raise ValueError(
            f"{experiment.name}, {found[0].cell.text}: expected records of one text, got"
            f" {'; '.join(fingerprints)}: run it with --again"
        )
    there = answers(experiment, found)
    if not there:
        return "No variant has run at every learning rate yet."
    names = list(
        dict.fromkeys(name for a in there for r in a.records for name in r.outcome.results)
    )
    header = ["variant", "parameters", "learning rate", "seeds", *(title(name) for name in names)]
    header += ["steps", "seconds", "tokens a second"]
    lines = [line(answer, names) for answer in there]
    if found[0].cell.budget == "time":
        header.append("relative time of a step")
        first = next((a for a in there if a.variant == experiment.variants[0]), None)
        for cells, answer in zip(lines, there, strict=True):
            cells.append(relative_time(answer, first))
    parts = [table(header, lines), facts(there)]
    complete = [
        a.variant
        for a in there
        if all(len(a.values(name)) == len(experiment.seeds) for name in names)
    ]
    missing = [f"`{v.name}`" for v in experiment.variants if v not in complete]
    if missing:
        parts.append(f"Not all runs of these variants are there yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def title(result: str) -> str:
    """Of a column."""
    named = {"bits_per_byte": "validation", "accuracy": "all"}
    if result.startswith("test_"):
        return f"test, window {int(result.removeprefix('test_')):,}"
    return named.get(result, f"span {result}")


def line(answer: Answer, names: Sequence[str]) -> list[str]:
    outcomes = [record.outcome for record in answer.records]
    cells = [f"{answer.variant.title} (`{answer.variant.name}`)"]
    cells.append(f"{outcomes[0].parameters - answer.variant.unused:,}")
    cells.append(f"{answer.learning_rate:g}{' *' if answer.at_edge else ''}")
    cells.append(str(len(outcomes)))
    cells += [amount(answer.values(name)) for name in names]
    seconds = statistics.fmean(outcome.seconds for outcome in outcomes)
    speed = statistics.fmean(outcome.bytes / outcome.seconds for outcome in outcomes)
    steps = counted([outcome.steps for outcome in outcomes])
    return [*cells, steps, f"{seconds:,.0f}", f"{speed:,.0f}"]


def relative_time(answer: Answer, first: Answer | None) -> str:
    """Of a step, to the first variant's: at equal time the steps are inverse to it."""
    if first is None:
        return "–"
    of_first, of_this = (
        statistics.fmean(record.outcome.steps for record in a.records) for a in (first, answer)
    )
    return f"{of_first / of_this:.2f}"


def counted(numbers: Sequence[int]) -> str:
    """One number where all are the same."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def amount(values: Sequence[float]) -> str:
    """The mean, and the range where there are several values."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean


def facts(there: Sequence[Answer]) -> str:
    """What the records of a table say of where they come from."""
    found = [record for answer in there for record in answer.records]
    machines = {
        f"{r.machine['processor']}, {r.machine['cores']} cores, {r.machine['threads']} thread"
        f"{'' if r.machine['threads'] == 1 else 's'} a run"
        for r in found
    }
    loads = [r.machine["load"] for r in found]
    seeds = sorted({r.cell.seed for r in found})
    revisions = sorted({r.outcome.revision for r in found})
    dates = sorted({r.date[:10] for r in found})
    return (
        f"Seeds {', '.join(map(str, seeds))}; mean (least to greatest of the seeds). * marks"
        f" a learning rate at the edge of its grid. {'; '.join(sorted(machines))}; load"
        f" {min(loads):g} to {max(loads):g}. Revision {', '.join(revisions)}; {', '.join(dates)}."
    )


def write(file: Path = DOCUMENT, results: Path = RESULTS) -> None:
    file.write_text(document(file.read_text(encoding="utf-8"), results), encoding="utf-8")
