"""A process in which contenders run, and the driver's handle on it."""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import AbsentError, Contender, Home, Pass, Problem, error
from benchmarks.timing import seconds_of


class FailedError(Exception):
    """A contender that began and did not end well; the message says how."""


def peak_bytes() -> float:
    """Not ru_maxrss: a new process inherits that from the one that began it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Bench:
    """The worker's side: holds the inputs of one problem, and the contenders made from them."""

    def __init__(self, problems: Sequence[Problem], at_least: float) -> None:
        self.at_least = at_least  # seconds of measuring that make a time
        self.problems = {(p.group, p.name): p for p in problems}
        self.held: tuple[str, str] | None = None
        self.inputs: Any = None
        self.made: dict[str, Mapping[str, Pass]] = {}
        self.warm: set[tuple[str, str]] = set()  # passes that have run, and are compiled

    def hold(self, key: tuple[str, str]) -> Problem:
        if key != self.held:
            self.rest()
            self.inputs = self.problems[key].inputs()
            self.held = key
        return self.problems[key]

    def get(self, key: tuple[str, str], name: str, which: str) -> Pass:
        problem = self.hold(key)
        if name not in self.made:
            contender: Contender = next(c for c in problem.contenders if c.name == name)
            self.made[name] = contender.make(self.inputs)
        if which not in self.made[name]:
            raise AbsentError(f"has no {which}")
        return self.made[name][which]

    # ---- What the driver calls ----------------------------------------------------------------

    def oracle(self, key: tuple[str, str], folder: Path) -> None:
        problem = self.hold(key)
        for i, array in enumerate(problem.oracle(self.inputs)):
            # Half the bytes; the rounding is a thousandth of any tolerance.
            np.save(folder / f"{i}.npy", array.astype(np.float32))

    def error(self, key: tuple[str, str], name: str, which: str, folder: Path) -> float | None:
        one = self.get(key, name, which)
        self.warm.add((name, which))
        if one.error is not None:
            return one.error()
        if one.result is None:
            return None
        files = sorted(folder.glob("*.npy"), key=lambda file: int(file.stem))
        return error(one.result(), [np.load(file, mmap_mode="r") for file in files])

    def seconds(self, key: tuple[str, str], name: str, which: str) -> float:
        one = self.get(key, name, which)
        if (name, which) not in self.warm:  # a floor, or its process was begun anew
            one.run()
            self.warm.add((name, which))
        return one.seconds() if one.seconds else seconds_of(one.run, self.at_least)

    def bytes(self, key: tuple[str, str], name: str, which: str) -> float:
        """Peak memory beyond what inputs and weights take; once a process."""
        one = self.get(key, name, which)
        # The peak so far is forgotten.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = peak_bytes()
        one.run()
        return peak_bytes() - before

    def rest(self) -> None:
        self.held, self.inputs, self.made, self.warm = None, None, {}, set()
        gc.collect()


def serve(
    connection: Connection, home: Home, environment: dict[str, str], path: list[str], quick: bool
) -> None:
    os.setsid()  # so that what a compiler starts ends with this process
    os.environ.update(environment)
    sys.path[:0] = path
    from benchmarks.problems import all_problems  # after the environment is set

    bench = Bench(all_problems(quick), at_least=0.01 if quick else 0.1)
    while True:
        try:
            method, *arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = ("done", getattr(bench, method)(*arguments))
        except AbsentError as reason:
            reply = ("absent", str(reason))
        except Exception as reason:
            if home not in ("peer", "jax"):  # theirs are long, and not ours to mend
                traceback.print_exc()
            first_line = (str(reason).splitlines() or [""])[0]
            reply = ("failed", f"{type(reason).__name__}: {first_line}"[:200])
        connection.send(reply)


class Worker:
    """The driver's side. A process that hangs or dies costs one result and is begun anew."""

    def __init__(
        self, home: Home, environment: dict[str, str], path: list[str], quick: bool
    ) -> None:
        self.arguments = (home, environment, path, quick)
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None

    def call(self, method: str, *arguments: Any, timeout: float = 600) -> Any:
        if self.process is None or self.connection is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(
                target=serve, args=(theirs, *self.arguments), daemon=True
            )
            self.process.start()
            theirs.close()
        self.connection.send((method, *arguments))
        if not self.connection.poll(timeout):
            self.stop()
            raise FailedError(f"no result after {timeout:.0f} s")
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self.stop()
            killed = " (killed: too little memory?)" if code == -signal.SIGKILL else ""
            raise FailedError(f"its process ended with {code}{killed}") from None
        if kind == "absent":
            raise AbsentError(value)
        if kind == "failed":
            raise FailedError(value)
        return value

    def stop(self) -> None:
        if self.process is not None and self.process.pid is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not become the leader of its group yet
                self.process.kill()
            self.process.join()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None
