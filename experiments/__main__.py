"""Run experiments, and write the tables of docs/experiments.md from their records.

    python -m experiments                    # the short form of all, at equal steps
    python -m experiments head_to_head --data FILE
    python -m experiments --tables           # the tables alone

Records that are there already are not made again: a stopped experiment goes on.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import report
from experiments.catalogue import EXPERIMENTS
from experiments.frame import Session, Settings
from experiments.language import SPLITS
from experiments.records import RESULTS, ROOT


def positive(text: str) -> int:
    """For argparse, whose message names the flag and the text."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [experiment.name for experiment in EXPERIMENTS]
    made.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(names)} [all]", default=[]
    )
    made.add_argument("--long", action="store_true", help="the long form: ten times the steps")
    made.add_argument(
        "--equal-time",
        action="store_true",
        help="each variant makes the steps that the first variant's time allows; its speed is"
        " measured first, where no record has its steps: on a machine with no other work",
    )
    made.add_argument(
        "--variant", action="append", default=[], help="this variant alone; repeatable"
    )
    made.add_argument("--text", default="enwik8", help=f"{' or '.join(SPLITS)} [enwik8]")
    made.add_argument("--data", type=Path, help="its file [data/TEXT]")
    made.add_argument(
        "--program",
        type=Path,
        default=ROOT / "build" / "release" / "gateloop",
        help="gateloop [build/release/gateloop]",
    )
    made.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "experiments",
        help="work folder [runs/experiments]",
    )
    made.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of records [experiments/results]"
    )
    made.add_argument("--threads", type=positive, default=1, help="of each run [1]")
    cores = len(os.sched_getaffinity(0))
    made.add_argument("--jobs", type=positive, default=cores, help=f"runs at once [{cores}]")
    made.add_argument(
        "--again", action="store_true", help="remove the records and weights of these first"
    )
    made.add_argument("--tables", action="store_true", help="only write the tables")
    return made


def run(chosen: argparse.Namespace) -> None:
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    for name in chosen.names:
        if name not in known:
            raise ValueError(f"no experiment {name}: expected one of {', '.join(known)}")
    settings = Settings(
        form="long" if chosen.long else "short",
        budget="time" if chosen.equal_time else "steps",
        text=chosen.text,
        data=(chosen.data or ROOT / "data" / chosen.text).resolve(),
        program=chosen.program.resolve(),
        runs=chosen.runs,
        threads=chosen.threads,
        jobs=chosen.jobs,
    )
    for name in chosen.names or known:
        file = chosen.results / f"{name}.json"
        session = Session(known[name], settings, file, lambda text: print(text, flush=True))
        print(f"== {name}, {settings.form} form, equal {settings.budget}", flush=True)
        if chosen.again:
            session.remove(chosen.variant)
        session.run(chosen.variant)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    try:
        if not chosen.tables:
            run(chosen)
        if chosen.results == RESULTS:
            report.write()
    except (OSError, ValueError, RuntimeError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nexperiments: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
