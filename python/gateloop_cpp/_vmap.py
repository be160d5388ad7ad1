"""Batching rules of the operators for ``torch.func.vmap``: the mapped axis joins the batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gateloop_cpp import _library as _library

Results = tuple[Tensor, ...]


def _folded(operator: Callable[..., Results]) -> Callable[..., tuple[Results, tuple[int, ...]]]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def fold(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if dim is None:
                argument, dim = argument.expand(info.batch_size, *argument.shape), 0
            return argument.movedim(dim, 0).flatten(0, 1)

        results = operator(*map(fold, arguments, in_dims))
        maps = info.batch_size
        unfolded = tuple(r.reshape(maps, r.shape[0] // max(maps, 1), *r.shape[1:]) for r in results)
        return unfolded, (0,) * len(results)

    return rule


# The backward operators too: a gradient may be mapped where the forward pass was not.
for _name in (
    "linear_recurrence",
    "_linear_recurrence_backward",
    "_attention_gate_loop",
    "_chunked_gate_loop",
    "_chunked_gate_loop_backward",
    "polar_gate_loop",
    "_polar_gate_loop_backward",
    "simple_gate_loop",
    "_simple_gate_loop_backward",
):
    torch.library.register_vmap(
        f"gateloop::{_name}", _folded(getattr(torch.ops.gateloop, _name).default)
    )
