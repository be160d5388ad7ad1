"""One sequence over several processes of one thread each, beside one such process, in turns.

    python -m benchmarks.distributed                  two processes, (1, 1,048,576, 64)
    python -m benchmarks.distributed --processes 4 --shape 1 65536 512

Prints, for every operator, the time of one process and of all together. Each is the fastest of all
rounds. Prints also how many times as fast all together are. Then the same of processor time, of the
process that took most: without the waiting on a busy machine. --lasting takes gates so near one
that no product of them underflows: then a block is read three times.
"""

import argparse
import datetime
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.environment import LARGE_PAGES, ROOT
from benchmarks.torch_passes import Run, operator_runs


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(1, 1048576, 64), metavar=tuple("BTD")
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lasting", action="store_true")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release")
    return parser.parse_args()


def sequences(name: str, shape: tuple[int, int, int], lasting: bool) -> list[Tensor]:
    torch.manual_seed(0)
    batch, time, channels = shape

    def normal(width: int = channels) -> Tensor:
        return torch.randn(batch, time, width)

    if name == "linear_recurrence":
        return [(normal() + (12 if lasting else 0)).sigmoid(), normal()]
    if name == "polar_gate_loop":
        return [normal(), normal(), normal(), normal(2 * channels) * (1000 if lasting else 1)]
    return [normal(), normal(), normal() + (12 if lasting else 0)]


class Times:
    """Seconds of rounds, from when all processes begin to when the last has ended."""

    def __init__(self) -> None:
        self.elapsed: list[float] = []
        self.busy: list[float] = []  # of the process that computed most

    def take(self, run: Run) -> None:
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        run()
        most = torch.tensor([time.perf_counter() - start, time.process_time() - busy])
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self.elapsed.append(float(most[0]))
        self.busy.append(float(most[1]))

    def compared_to(self, others: "Times") -> str:
        parts = []
        for what, ours, theirs in (
            ("elapsed", min(self.elapsed), min(others.elapsed)),
            ("processor", min(self.busy), min(others.busy)),
        ):
            parts.append(f"{what} {1e3 * ours:.1f} ms, {1e3 * theirs:.1f} ms: {ours / theirs:.2f}")
        return "; ".join(parts)


def measure(rank: int, chosen: argparse.Namespace, store: str) -> None:
    from gateloop_cpp import distributed, ops

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=chosen.processes,
        timeout=datetime.timedelta(minutes=5),
    )
    for name in ("linear_recurrence", "simple_gate_loop", "polar_gate_loop"):
        whole = sequences(name, tuple(chosen.shape), chosen.lasting)
        block = [t.tensor_split(chosen.processes, 1)[rank].contiguous() for t in whole]
        alone = operator_runs(getattr(ops, name), whole) if rank == 0 else {}
        together = operator_runs(getattr(distributed, name), block)
        for which, run in together.items():
            one, every = Times(), Times()
            for _ in range(chosen.rounds):
                one.take(alone.get(which, lambda: None))
                every.take(run)
            if rank == 0:
                print(f"{name}, {which}: {one.compared_to(every)}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    chosen = options()
    os.environ |= LARGE_PAGES
    os.environ["GATELOOP_OPS_LIBRARY"] = str(chosen.build.resolve() / "lib/libgateloop_ops.so")
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (chosen, str(Path(folder) / "store")), nprocs=chosen.processes)


if __name__ == "__main__":
    main()
