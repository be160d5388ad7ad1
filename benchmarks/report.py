"""Tables for readers, from what was measured.

python -m benchmarks.report    puts the records of benchmarks/results/ into its bench.md, README.md
                               and docs
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks import kernels, records
from benchmarks.contenders import Kind
from benchmarks.environment import ROOT
from benchmarks.kernels import Kernel
from benchmarks.problems import all_problems
from benchmarks.records import Record, Row


def amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def quotient(row: Row | None, over: Row | None) -> str:
    """Their ratio; "–" where one is missing, or over a peak of zero bytes."""
    return ratio(row.value / over.value) if row and over and over.value else "–"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    numbers = "|".join("---" if i == 0 else "---:" for i in range(len(header)))
    rows = [f"| {' | '.join(line)} |" for line in (header, *lines)]
    return "\n".join([rows[0], f"|{numbers}|", *rows[1:]])


def best(rows: Iterable[Row], kind: Kind) -> Row | None:
    """The fastest, or leanest, of a kind."""
    able = [row for row in rows if row.kind == kind and row.values]
    return min(able, key=lambda row: row.value, default=None)


def by_pass(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one pass of one problem together."""

    def key(row: Row) -> tuple[str, str, str]:
        return row.group, row.problem, row.which

    order = list(dict.fromkeys(map(key, rows)))
    ordered = sorted(rows, key=lambda row: order.index(key(row)))
    return [list(lane) for _, lane in groupby(ordered, key)]


def summary_line(lane: Sequence[Row]) -> list[str]:
    first, ours = lane[0], best(lane, "ours")
    floor, peer = best(lane, "floor"), best(lane, "peer")
    memory = ", peak memory" if first.unit == "bytes" else ""
    line = [f"{first.problem}, {first.which}{memory}"]
    line.append(f"{amount(ours.value, ours.unit)}, {ours.contender}" if ours else "–")
    line.append(quotient(ours, floor))
    line.append(f"{amount(peer.value, peer.unit)}, {peer.contender}" if peer else "–")
    line.append(quotient(peer, ours))
    seed = [row for row in lane if row.contender == "gateloop-transformer" and row.values]
    line.append(quotient(seed[0] if seed else None, ours))
    return line


def summary(rows: Sequence[Row]) -> str:
    """The fastest of ours against the floor and the fastest of the peers."""
    header = ["what", "ours", "ours / floor", "best peer", "best peer / ours", "reference / ours"]
    lanes = [lane for lane in by_pass(rows) if lane[0].group != "growth"]
    text = table(header, map(summary_line, lanes))
    return f"{text}\n{throughput(rows)}"


def throughput(rows: Sequence[Row]) -> str:
    """Many sequences together against one, in bytes a second."""
    text = ""
    lanes = [lane for lane in by_pass(rows) if lane[0].group == "generation"]
    for which in dict.fromkeys(lane[0].which for lane in lanes):
        fastest = [best(lane, "ours") for lane in lanes if lane[0].which == which]
        rates = [row.work / row.value for row in fastest if row]
        if len(rates) == 2:
            text += (
                f"\nGeneration, {which}: {rates[0]:,.0f} bytes/s alone,"
                f" {rates[1]:,.0f} together: {ratio(rates[1] / rates[0])} times as many.\n"
            )
    return text


def sentence(row: Row) -> str:
    name = f"{row.problem}, {row.which}, {row.contender}"
    if row.absent:
        return f"{name}: absent: {row.absent}"
    if row.failed:
        return f"{name}: failed: {row.failed}"
    return f"{name}: error {row.error:.1e}, at most {row.tolerance:.0e} allowed"


def details(rows: Sequence[Row]) -> str:
    lines = []
    for lane in by_pass(rows):
        floor = best(lane, "floor")
        for row in lane:
            if not row.values:
                continue
            over = quotient(row, floor)
            error = "–" if row.error is None else f"{row.error:.1e}"
            value = amount(row.value, row.unit)
            name = f"{row.contender}, base" if row.kind == "base" else row.contender
            lines.append([f"{row.problem}, {row.which}", name, value, over, error])
    header = ["what", "contender", "median", "over floor", "error"]
    text = f"## Everyone\n\n{table(header, lines)}"
    out = [sentence(row) for row in rows if not row.values]
    if out:
        text += "\n\nNot measured:\n\n" + "\n".join(f"- {line}" for line in out)
    return text


def comparison(rows: Sequence[Row]) -> str:
    """This revision beside the base."""
    lines = []
    for lane in by_pass(rows):
        base = {row.contender: row for row in lane if row.kind == "base" and row.values}
        for row in lane:
            if row.kind != "ours" or not row.values or row.contender not in base:
                continue
            other = base[row.contender]
            values = [
                amount(row.value, row.unit),
                amount(other.value, row.unit),
                quotient(other, row),
            ]
            lines.append([f"{row.problem}, {row.which}", row.contender, *values])
    return table(["what", "contender", "here", "base", "base / here"], lines)


def kernel_table(measured: Sequence[Kernel]) -> str:
    lines = [[k.name, f"{k.ms:.3g} ms", ratio(k.over_floor), ratio(k.speedup)] for k in measured]
    header = ["kernel / (B x T x D)", "time", "over an elementwise pass", "over one thread"]
    return table(header, lines)


def kernel_comparison(pairs: Sequence[tuple[Sequence[Kernel], Sequence[Kernel]]]) -> str:
    """The fastest of the runs of each side."""

    def fastest(runs: Iterable[Sequence[Kernel]]) -> dict[str, float]:
        times: dict[str, list[float]] = {}
        for kernel in (kernel for run in runs for kernel in run):
            times.setdefault(kernel.name, []).append(kernel.ms)
        return {name: min(values) for name, values in times.items()}

    here = fastest(run for run, _ in pairs)
    there = fastest(run for _, run in pairs)
    lines = [
        [name, f"{ms:.3g} ms", f"{there[name]:.3g} ms", ratio(there[name] / ms)]
        for name, ms in here.items()
        if name in there
    ]
    return table(["kernel", "here", "base", "base / here"], lines)


def document(facts: dict[str, str], parts: Sequence[str]) -> str:
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return "\n\n".join(["# Benchmark", head, *parts]) + "\n"


# ---- Documents that show results ----------------------------------------------------------------

IN_README = ("operators", "layer", "model", "generation", "memory")


def load(results: Path, groups: Iterable[str]) -> dict[str, Record]:
    """The records there are of these groups."""
    files = {group: records.file_of(group, results) for group in groups}
    return {group: records.load(file) for group, file in files.items() if file.exists()}


def revisions(measured: dict[str, Record]) -> str:
    """That of the first group, and of those that were measured at another."""
    of = {group: record.environment["revision"] for group, record in measured.items()}
    first = next(iter(of.values()))
    others = ", ".join(f"{group}: {other}" for group, other in of.items() if other != first)
    return f"{first} ({others})" if others else first


def everything(results: Path) -> str:
    """bench.md: kernels, and every contender of every group."""
    measured = load(results, dict.fromkeys(problem.group for problem in all_problems(quick=True)))
    rows = [row for record in measured.values() for row in record.rows]
    facts = next(iter(measured.values())).environment | {"revision": revisions(measured)}
    facts.pop("command")
    of_kernels = kernel_table(kernels.parse(results / "kernels.json"))
    return document(facts, [of_kernels, summary(rows), details(rows)])


def readme_table(results: Path) -> str:
    """The problems of the first shape, with what they were measured on."""
    measured = load(results, IN_README)
    rows = [row for record in measured.values() for row in record.rows]
    shown = [row for row in rows if row.group != "operators" or "(1, 65,536, 512)" in row.problem]
    facts = next(iter(measured.values())).environment
    made = ", ".join([facts["machine"], facts["compiler"], f"torch {facts['torch']}"])
    made += f", jax {facts['jax']}, {facts['peer']}, revision {revisions(measured)}"
    return f"{summary(shown)}\nMeasured by `make bench` on {made}."


def heads_table(record: Record) -> str:
    """gate_loop with wide heads beside its floors and the reference."""
    lines = []
    for lane in by_pass(record.rows):
        row = {row.contender: row for row in lane if row.values}
        ours, products = row["torch.ops.gateloop"].value, row["matrix products"].value
        line = [lane[0].problem, lane[0].which, amount(ours, "seconds")]
        line += [amount(products, "seconds"), f"{100 * products / ours:.0f} %"]
        for name in ("causal attention", "gateloop-transformer"):
            value = row[name].value if name in row else None
            line.append(
                "" if value is None else f"{amount(value, 'seconds')}, {ratio(value / ours)}"
            )
        lines.append(line)
    header = ["what", "pass", "`gate_loop`", "products", "their speed"]
    text = table([*header, "causal attention, / ours", "reference, / ours"], lines)
    facts = record.environment
    return f"{text}\n\nMeasured on {facts['machine']}, revision {facts['revision']}."


def with_table(document: str, name: str, new: str) -> str:
    """The document with what stands between the two markers of this name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{begin}.*{end}", re.S)
    if len(pattern.findall(document)) != 1:
        raise ValueError(f"a document needs {begin} and {end} once, around its table")
    return pattern.sub(lambda _: f"{begin}\n{new}\n{end}", document)


def documents(root: Path) -> dict[Path, str]:
    """Every document that shows results, as it has to read."""
    results = root / "benchmarks" / "results"
    readme = of_kernels = of_heads = "Not measured yet: `make bench`."
    if results.exists():
        readme = readme_table(results)
        of_kernels = kernel_table(kernels.parse(results / "kernels.json"))
        of_heads = heads_table(records.load(records.file_of("wide heads", results)))
    tables = {
        root / "README.md": {"bench": readme},
        root / "docs" / "performance.md": {"heads": of_heads, "bench": of_kernels},
    }
    texts = {results / "bench.md": everything(results)} if results.exists() else {}
    for file, parts in tables.items():
        texts[file] = file.read_text(encoding="utf-8")
        for name, part in parts.items():
            texts[file] = with_table(texts[file], name, part)
    return texts


def main() -> None:
    for file, text in documents(ROOT).items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
