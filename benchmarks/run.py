"""Measures our code, its peers and the machine's floors side by side.

Every result is held against a float64 oracle before anything is timed, and what is wrong is not
timed. Then all contenders of a problem take turns, round after round, and medians are reported.

    python -m benchmarks.run                  everything; results go to benchmarks/results/
    python -m benchmarks.run --base HEAD~3    ours beside another revision of it
    python -m benchmarks.run --quick          tiny shapes: whether it all still runs
    python -m benchmarks.run --only 'layer|generation'
"""

import argparse
import re
import sys
import time
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from benchmarks import kernels, plot, records, report
from benchmarks.base import Base, built
from benchmarks.environment import ROOT, environment
from benchmarks.measure import Measurement, Pool
from benchmarks.problems import all_problems
from benchmarks.records import Record, Row

QUICK_KERNELS = "/4x256x512"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", metavar="REGEX", help="of 'kernels' and the names of problems")
    parser.add_argument("--base", metavar="REVISION")
    parser.add_argument("--rounds", type=int, help="default 5, quick 1")
    parser.add_argument("--budget", type=float, default=10, help="seconds of the rounds of a pass")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release")
    parser.add_argument(
        "--results",
        type=Path,
        help="default benchmarks/results, build/bench unless all is measured",
    )
    chosen = parser.parse_args()
    whole = not (chosen.quick or chosen.only or chosen.base)
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 5)
    folder = "benchmarks/results" if whole else "build/bench"
    chosen.results = (chosen.results or ROOT / folder).resolve()
    chosen.build = chosen.build.resolve()
    return chosen


def measure_problems(
    chosen: argparse.Namespace, base: Base | None, facts: dict[str, str]
) -> list[Row]:
    """Saves each group once it is measured: all together take the better part of an hour."""
    pool = Pool(chosen.build, base, chosen.quick)
    rows: list[Row] = []
    try:
        for _, problems in groupby(all_problems(chosen.quick), key=attrgetter("group")):
            of_group: list[Row] = []
            for problem in problems:
                name = f"{problem.group}: {problem.name}"
                if chosen.only and not re.search(chosen.only, name):
                    continue
                start = time.perf_counter()
                of_group += Measurement(problem, pool, base, chosen.rounds, chosen.budget).rows()
                say(f"{name}: measured in {time.perf_counter() - start:.0f} s")
            records.save(Record(facts, of_group), chosen.results)
            rows += of_group
    finally:
        pool.stop()
    return rows


def measure_kernels(chosen: argparse.Namespace, base: Base | None) -> str:
    """The report of the kernels; beside a base, alternately and the faster of two runs."""
    only = QUICK_KERNELS if chosen.quick else None
    binary = "recurrence_benchmark"
    file = chosen.results / "kernels.json"
    if base is None:
        table = report.kernel_table(kernels.run(chosen.build / binary, file, only))
    else:
        there = file.with_name("kernels_base.json")
        pairs = [
            (kernels.run(chosen.build / binary, file, only),
             kernels.run(base.build / binary, there, only))
            for _ in range(2)
        ]  # fmt: skip
        table = report.kernel_comparison(pairs)
    say("kernels: measured")
    return table


def say(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


def main() -> int:
    arguments = sys.argv[1:]
    chosen = options()
    base = built(chosen.base) if chosen.base else None
    facts = environment(chosen.build, arguments)
    if base is not None:
        facts["base"] = base.revision
    with_kernels = chosen.only is None or re.search(chosen.only, "kernels")
    parts = [measure_kernels(chosen, base)] if with_kernels else []

    rows = measure_problems(chosen, base, facts)
    parts += [report.comparison(rows)] if base else []
    parts += [report.summary(rows), report.details(rows)]
    if any(row.group == "growth" for row in rows):
        here = [row for row in rows if row.kind != "base"]
        plot.growth(here, chosen.results / "growth.svg")
    text = report.document(facts, parts)
    (chosen.results / "bench.md").write_text(text, encoding="utf-8")
    print(text)
    say(f"written to {chosen.results}; for README.md and docs: python -m benchmarks.report")

    bad = [row for row in rows if row.kind == "ours" and (row.failed or row.wrong)]
    for row in bad:
        say(f"OURS IS {'WRONG' if row.wrong else 'BROKEN'}: {report.sentence(row)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
