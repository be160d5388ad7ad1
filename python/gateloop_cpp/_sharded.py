"""Models sharded over processes: their parameters are DTensors, as of FSDP2.

After a forward pass FSDP2 may keep parameters whole for the backward pass; what state_dict() gives
is sharded always.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Shards:
    """The processes that tensors of a model are sharded over; without any, this one alone.

    True where there are any. Each of them has to call the model and the methods here equally often.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # In the order of the tensors, which is the same in every process; a set's is not.
        meshes = (getattr(tensor, "device_mesh", None) for tensor in tensors)
        self._meshes: list[Any] = [mesh for mesh in dict.fromkeys(meshes) if mesh is not None]

    def __bool__(self) -> bool:
        return bool(self._meshes)

    @property
    def writer(self) -> bool:
        """Whether this is the one process that writes files."""
        return not any(any(mesh.get_coordinate()) for mesh in self._meshes)

    def any(self, here: bool) -> bool:
        """Whether it is so in any of the processes."""
        for mesh in self._meshes:
            flag = torch.tensor(int(here), device=mesh.device_type)
            for group in mesh.get_all_groups():
                dist.all_reduce(flag, dist.ReduceOp.MAX, group)
            here = bool(flag)
        return here


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, whole where sharded: one at a time takes memory."""
    for name, tensor in tensors.items():
        whole = getattr(tensor, "full_tensor", None)
        yield name, tensor if whole is None else whole()
