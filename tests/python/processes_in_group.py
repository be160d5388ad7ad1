"""A function in several processes of one gloo group."""

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn


def in_group(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """``function(*arguments)`` in ``size`` processes of the default group, of one thread each.

    What one of them raises is raised here, and ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_member, (size, str(Path(folder) / "store"), function, arguments), nprocs=size)


def _member(
    rank: int, size: int, store: str, function: Callable[..., None], arguments: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    function(*arguments)
    dist.destroy_process_group()
    # Gloo's threads outlive it where torch._dynamo was imported meanwhile, as torch.optim and
    # torch.utils.checkpoint do. One that frees a tensor as Python ends aborts the process
    # (github.com/pytorch/pytorch/pull/179291).
    os._exit(0)
