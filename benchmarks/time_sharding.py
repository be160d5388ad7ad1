"""One sequence over two processes of one thread each, beside one process of one and two threads.

A contender's processes are this module, run as a program:

    python -m benchmarks.time_sharding RANK PROCESSES THREADS STORE OPERATOR B T D

They take the name of a pass a line, and a folder for the results or nothing for the time. Each
writes a line when it is done; that of rank 0 holds the seconds until all were.
"""

import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.contenders import AbsentError, Array, Contender, Kind, Pass, Problem
from benchmarks.environment import ROOT
from benchmarks.operators import OPERATORS, PASSES, TOLERANCE, Inputs, Shape, inputs
from benchmarks.torch_passes import oracle_passes, our_package, torch_passes

PROCESSES = 2
CALLS = 3  # of which the fastest counts
CONTENDERS: list[tuple[str, Kind, tuple[int, int]]] = [
    ("two processes of one thread", "ours", (PROCESSES, 1)),
    ("one process of one thread", "peer", (1, 1)),
    ("one process of two threads", "floor", (1, PROCESSES)),  # what the cores give
]


# ---- The processes -------------------------------------------------------------------------------


def passes(rank: int, processes: int, name: str, shape: Shape) -> dict[str, Pass]:
    data = inputs(OPERATORS[name], shape)
    blocks = [
        np.array_split(x.reshape(*x.shape[:2], -1), processes, 1)[rank].copy()
        for x in (*data.arrays, data.gradient)
    ]
    package = our_package()
    operator = getattr(package.distributed if processes > 1 else package.ops, name)
    return torch_passes(lambda *leaves: operator(*leaves)[0], blocks[:-1], blocks[-1])


def seconds(run: Pass, processes: int) -> float:
    """From when all processes begin to when the last has ended."""
    if processes > 1:
        dist.barrier()
    start = time.perf_counter()
    run.run()
    longest = torch.tensor(time.perf_counter() - start)
    if processes > 1:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def member(rank: int, processes: int, threads: int, store: str, name: str, *shape: int) -> None:
    torch.set_num_threads(threads)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
        )
    batch, length, channels = shape
    made = passes(rank, processes, name, (batch, length, channels))
    print("ready", flush=True)
    for line in sys.stdin:
        which, _, folder = line.rstrip("\n").partition("\t")
        one = made[which]
        if folder:
            if one.result is not None:
                np.savez(Path(folder) / f"{rank}.npz", *one.result())
            print("written", flush=True)
        else:
            print(min(seconds(one, processes) for _ in range(CALLS)), flush=True)


# ---- The contender -------------------------------------------------------------------------------


def end(members: Sequence[subprocess.Popen[str]]) -> None:
    for each in members:
        each.kill()
    for each in members:
        each.communicate()


class Group:
    """The processes of one contender. They end with it."""

    def __init__(self, processes: int, threads: int, name: str, shape: Shape) -> None:
        self.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "benchmarks.time_sharding"]
        store = f"{self.folder.name}/store"
        what = [str(processes), str(threads), store, name, *map(str, shape)]
        self.members = [
            subprocess.Popen(
                [*command, str(rank), *what],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        weakref.finalize(self, end, self.members)
        self.answers()

    def answers(self) -> list[str]:
        lines = [each.stdout.readline() if each.stdout else "" for each in self.members]
        if not all(lines):
            raise RuntimeError(f"process {lines.index('')} of {len(lines)} ended")
        return lines

    def ask(self, line: str) -> list[str]:
        for each in self.members:
            if each.stdin is not None:
                each.stdin.write(f"{line}\n")
                each.stdin.flush()
        return self.answers()

    def seconds(self, which: str) -> float:
        return float(self.ask(which)[0])

    def result(self, which: str) -> list[Array]:
        with tempfile.TemporaryDirectory() as folder:
            self.ask(f"{which}\t{folder}")
            files = [np.load(Path(folder) / f"{rank}.npz") for rank in range(len(self.members))]
            return [np.concatenate([file[key] for file in files], 1) for key in files[0]]


def contender_passes(
    processes: int, threads: int, name: str, shape: Shape, data: Inputs
) -> Mapping[str, Pass]:
    del data  # every process draws its own
    if processes > 1 and not hasattr(our_package(), "distributed"):
        raise AbsentError("this revision shards no time")
    group = Group(processes, threads, name, shape)

    def one(which: str) -> Pass:
        return Pass(
            partial(group.seconds, which),
            partial(group.result, which),
            seconds=partial(group.seconds, which),
        )

    return {which: one(which) for which in PASSES}


def problem(name: str, shape: Shape) -> Problem:
    operator = OPERATORS[name]
    return Problem(
        "time sharding",
        f"{name} ({', '.join(f'{n:,}' for n in shape)})",
        dict.fromkeys(PASSES, TOLERANCE),
        partial(inputs, operator, shape),
        lambda data: oracle_passes(operator.oracle, data.arrays, data.gradient),
        [
            Contender(label, kind, "ours", partial(contender_passes, *sizes, name, shape))
            for label, kind, sizes in CONTENDERS
        ],
    )


def problems(quick: bool) -> list[Problem]:
    if quick:
        return [problem("linear_recurrence", (1, 96, 16))]
    # Not the polar gate: the processes and the oracle would take 15 GB.
    return [problem(name, (1, 2**20, 64)) for name in ("linear_recurrence", "simple_gate_loop")]


if __name__ == "__main__":
    rank, processes, threads, store, name, *shape = sys.argv[1:]
    member(int(rank), int(processes), int(threads), store, name, *map(int, shape))
