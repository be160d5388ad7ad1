"""From a problem to its rows: validate everyone, then let them take turns."""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.base import Base
from benchmarks.contenders import AbsentError, Home, Kind, Problem
from benchmarks.environment import LARGE_PAGES, ROOT
from benchmarks.records import Row
from benchmarks.timing import interleave
from benchmarks.worker import FailedError, Worker

# Of one answer: compiling the peer takes up to two minutes.
TIMEOUT = 300.0


def environment_of(build: Path) -> dict[str, str]:
    """What a worker finds a build by."""
    variables = {
        "GATELOOP_OPS_LIBRARY": str(build / "lib" / "libgateloop_ops.so"),
        "GATELOOP_PROGRAM": str(build / "gateloop"),
        **LARGE_PAGES,
    }
    jax_library = build / "lib" / "libgateloop_jax.so"
    if jax_library.exists():
        variables["GATELOOP_JAX_LIBRARY"] = str(jax_library)
    return variables


def packages(tree: Path) -> list[str]:
    """Where our Python packages lie."""
    return [str(tree / "python"), str(tree / "python" / "gateloop_jax")]


class Pool:
    """One process for each home, begun when it is first needed."""

    def __init__(self, build: Path, base: Base | None, quick: bool) -> None:
        ours = (environment_of(build), packages(ROOT), quick)
        homes: tuple[Home, ...] = ("ours", "definitions", "peer", "jax", "floor")
        self.arguments = dict.fromkeys(homes, ours)
        if base is not None:
            tree = base.tree if (base.tree / "python").exists() else ROOT
            theirs = (environment_of(base.build), packages(tree), quick)
            self.arguments["base"] = theirs
        self.workers: dict[Home, Worker] = {}

    def fresh(self, home: Home) -> Worker:
        return Worker(home, *self.arguments[home])

    def __getitem__(self, home: Home) -> Worker:
        if home not in self.workers:
            self.workers[home] = self.fresh(home)
        return self.workers[home]

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()


@dataclass(frozen=True)
class Entry:
    """A contender in the place where it runs."""

    name: str  # that of the problem
    kind: Kind
    home: Home


def entries(problem: Problem, base: Base | None) -> Iterator[Entry]:
    """All contenders; or beside a base, ours as they are here and there, and the floors."""
    for contender in problem.contenders:
        if base is None or contender.kind == "floor":
            yield Entry(contender.name, contender.kind, contender.home)
        elif contender.home == "ours":
            yield Entry(contender.name, "ours", "ours")
            yield Entry(contender.name, "base", "base")


class Measurement:
    def __init__(self, problem: Problem, pool: Pool, base: Base | None, rounds: int, budget: float):
        self.problem, self.pool, self.rounds, self.budget = problem, pool, rounds, budget
        self.key = (problem.group, problem.name)
        self.lanes = [
            (entry, self.row(entry, which))
            for which in problem.tolerances
            for entry in entries(problem, base)
        ]

    def row(self, entry: Entry, which: str) -> Row:
        p = self.problem
        where = (p.group, p.name, which, entry.name, entry.kind)
        return Row(*where, p.unit, p.work, p.tolerances[which])

    def call(self, worker: Worker, method: str, entry: Entry, row: Row, *arguments: Any) -> Any:
        """The worker's result, or None with the reason in the row."""
        request = (method, self.key, entry.name, row.which, *arguments)
        start = time.perf_counter()
        try:
            return worker.call(*request, timeout=TIMEOUT)
        except AbsentError as reason:
            row.absent = str(reason)
        except FailedError as reason:
            row.failed = str(reason)
        finally:
            seconds = time.perf_counter() - start
            if seconds > 10:  # who makes the reader wait
                what = f"{method} of {entry.name}, {row.which}"
                print(f"bench:   {what}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return None

    def rows(self) -> list[Row]:
        for worker in self.pool.workers.values():
            worker.call("rest", timeout=TIMEOUT)  # the oracle needs the memory
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.pool["floor"].call("oracle", self.key, Path(folder), timeout=TIMEOUT)
            except FailedError as reason:
                for _, row in self.lanes:
                    row.failed = f"no oracle: {reason}"
            else:
                self.measure(Path(folder))
        for _, row in self.lanes:
            if row.absent or row.failed or row.wrong:
                row.values = []
        return [row for _, row in self.lanes]

    def measure(self, folder: Path) -> None:
        if self.problem.unit == "bytes":
            self.weigh(folder)
        else:
            self.validate(folder)
            self.take_turns()

    def weigh(self, folder: Path) -> None:
        """In processes of their own, which end before the next begins."""
        for worker in self.pool.workers.values():
            worker.stop()
        for entry, row in self.lanes:
            worker = self.pool.fresh(entry.home)
            peak = self.call(worker, "bytes", entry, row)
            if peak is not None:
                row.error = self.call(worker, "error", entry, row, folder)
                row.values = [peak]
            worker.stop()

    def validate(self, folder: Path) -> None:
        broken: dict[Entry, str] = {}
        for entry, row in self.lanes:
            # What failed in one pass, after minutes perhaps, is not tried in another.
            row.failed = broken.get(entry)
            if row.failed is None:
                row.error = self.call(self.pool[entry.home], "error", entry, row, folder)
            if row.failed is not None:
                broken[entry] = row.failed

    def take_turns(self) -> None:
        for which in self.problem.tolerances:
            able = {
                entry: row
                for entry, row in self.lanes
                if row.which == which and not (row.absent or row.failed or row.wrong)
            }
            measures = {
                entry: partial(self.call, self.pool[entry.home], "seconds", entry, row)
                for entry, row in able.items()
            }
            for entry, values in interleave(measures, self.rounds, self.budget).items():
                able[entry].values = [value for value in values if value is not None]
