"""Batching rules of the operators for ``torch.func.vmap``: the mapped axis joins the batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gateloop_cpp import _library as _library

Results = tuple[Tensor, ...]
Batched = tuple[Results, tuple[int, ...]]


class Call(NamedTuple):
    """Of an operator under vmap."""

    maps: int
    in_dims: tuple[int | None, ...]  # the mapped axis of each argument
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # by name, not mapped


Rule = Callable[[Call], Batched]


def _folded(operator: Callable[..., Results]) -> Rule:
    def rule(call: Call) -> Batched:
        maps, in_dims, arguments, options = call

        def fold(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if dim is None:
                argument, dim = argument.expand(maps, *argument.shape), 0
            return argument.movedim(dim, 0).flatten(0, 1)

        results = operator(*map(fold, arguments, in_dims), **options)
        unfolded = tuple(r.reshape(maps, r.shape[0] // max(maps, 1), *r.shape[1:]) for r in results)
        return unfolded, (0,) * len(results)

    return rule


def _one_by_one(name: str, operator: Callable[..., Results]) -> Rule:
    """Packed sequences leave no batch to join, and each map may cut them elsewhere."""

    def rule(call: Call) -> Batched:
        maps, in_dims, arguments, options = call
        if maps == 0:
            raise ValueError(f"gateloop::{name}: vmap with cu_seqlens must map over 1 or more")
        results = [
            operator(
                *(
                    argument if dim is None else argument.select(dim, i)
                    for argument, dim in zip(arguments, in_dims, strict=True)
                ),
                **options,
            )
            for i in range(maps)
        ]
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _rule(name: str) -> Callable[..., Batched]:
    operator = getattr(torch.ops.gateloop, name).default
    names = [argument.name for argument in operator._schema.arguments]
    packed = slice(names.index("cu_seqlens"), None) if "cu_seqlens" in names else slice(0)
    folded, one_by_one = _folded(operator), _one_by_one(name, operator)

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any, **options: Any
    ) -> Batched:
        # A call may leave arguments out at its end.
        chosen = folded if next(iter(arguments[packed]), None) is None else one_by_one
        return chosen(Call(info.batch_size, in_dims, arguments, options))

    return rule


# The backward operators too: a gradient may be mapped where the forward pass was not.
for _name in (
    "gate_loop",
    "gate_loop_step",
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
    torch.library.register_vmap(f"gateloop::{_name}", _rule(_name))
