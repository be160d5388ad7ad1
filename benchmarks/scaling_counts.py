"""Bytes that collectives and training steps send on gloo, counted at a loopback interface.

    python -m benchmarks.scaling_counts PROCESSES

prints JSON. The interface has to be its own, as in `unshare --net`: what others send counts too.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from gateloop_cpp import Transformer

BUCKET = 25 * 2**20  # c10d's kDefaultBucketBytesCap
STATE = (16, 512)  # B, D of the time-sharded recurrence
MODEL: dict[str, Any] = dict(dim=512, num_tokens=256, depth=6, post_ln_norm=True)
REPEATS = 3


def sent() -> int:
    """Bytes that have left the loopback interface, headers included."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("/proc/net/dev: there is no lo")


def between_barriers(work: Callable[[], object]) -> int:
    """Bytes of all processes together for some calls, and for barriers."""
    dist.barrier()
    before = sent()
    dist.barrier()  # none begins before all have read
    for _ in range(REPEATS):
        work()
    dist.barrier()
    return sent() - before


def counted(work: Callable[[], object]) -> int:
    """Bytes of all processes together for one call."""
    return (between_barriers(work) - between_barriers(lambda: None)) // REPEATS


def fastest(work: Callable[[], object], times: int = 12) -> float:
    """Seconds; what else runs here makes it longer only."""
    seconds = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def collectives(work: Callable[[], object]) -> int:
    """How many collectives one call makes."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return sum(event.count for event in seen.key_averages() if event.key.startswith("gloo:"))


def step(zero: bool) -> Callable[[], None]:
    """Of data parallel training, and with ZeRO stage 1."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Transformer(**MODEL))
    optimizer: Any = (
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-4)
        if zero
        else torch.optim.Adam(model.parameters(), lr=1e-4)
    )
    ids = torch.randint(256, (1, 9))

    def run() -> None:
        optimizer.zero_grad()
        model(ids, return_loss=True).backward()
        optimizer.step()

    for _ in range(2):  # after its first pass Reducer lays out its buckets anew
        run()
    return run


def time_sharded_step(model: Transformer, batch: int) -> Callable[[], None]:
    """Forward and backward on a sequence that the processes share, without the gradients' sum."""
    ids = torch.randint(256, (batch, 8))
    group = dist.group.WORLD

    def run() -> None:
        model.zero_grad()
        model(ids, return_loss=True, time_group=group).backward()

    return run


def measure() -> dict[str, Any]:
    processes = dist.get_world_size()
    bucket = torch.ones(BUCKET // 4)
    state = torch.ones(*STATE, dtype=torch.complex64)
    states = torch.ones(processes * STATE[0], *STATE[1:], dtype=torch.complex64)
    works: dict[str, Callable[[], object]] = {
        "all-reduce of a bucket": lambda: dist.all_reduce(bucket),
        "all-reduce of a bucket, bfloat16": lambda: dist.all_reduce(bucket.bfloat16()),
        "broadcast of a bucket": lambda: dist.broadcast(bucket, 0),
        "all-gather of a state": lambda: dist.all_gather_single(states, state),
        "data parallel step": step(zero=False),
        "ZeRO-1 step": step(zero=True),
        "time-sharded step": time_sharded_step(Transformer(**MODEL), STATE[0]),
    }
    counts = {
        name: {"bytes": counted(work), "collectives": collectives(work)}
        for name, work in works.items()
    }
    return {
        "processes": processes,
        "parameters": [p.numel() for p in Transformer(**MODEL).parameters()],
        "counts": counts,
        "bucket_seconds": fastest(works["all-reduce of a bucket"]),
    }


def worker(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch._C._distributed_c10d.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    found = measure()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # gloo's threads outlive the group: see examples/train_distributed.py


def main() -> None:
    processes = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(processes):
            if (child := os.fork()) == 0:
                worker(rank, processes, folder)
            children.append(child)
        for child in children:
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(f"a process ended with status {status}")
        print(Path(folder, "found.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
