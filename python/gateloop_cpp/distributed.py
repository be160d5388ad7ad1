"""The recurrences of :mod:`gateloop_cpp.ops` over one sequence that many processes hold.

Each process of a c10d group holds a block of consecutive steps: rank 0 the first, the next rank
those that follow, and so on. Blocks may differ in length and may be empty. A process passes its
block and gets its block of the outputs; between processes go states, whatever T is.

All processes of the group call a function together and in the same order. Options are the same on
all, and so are shapes but for T. If one runs the backward pass of a call, all do.

Arguments that differ from those of :mod:`gateloop_cpp.ops`:

- ``group``: the processes; default: all.
- ``initial_state``: before the first step of the whole sequence. The process that reads that step
  uses it: rank 0, or with ``reverse`` the last rank; the others may leave it out. Its gradient
  arrives there, and zeros on the other processes that pass it.
- ``cu_seqlens``: (N + 1), of the whole packed sequence, the same on every process.
- ``mask``: (B, T) of this process's block.

The final state is that of the whole sequence, the same on every process. As for torch's own
collectives, the loss is the sum of what the processes call ``backward`` on: a final state that each
of them uses receives the sum of their gradients.

A block is read about once where the products of its first and last few thousand transitions
underflow to zero. Gates below one make such products. Else it is read three times. Infinities and
NaN go no further than the block at whose end their factor is zero.

Differentiable once, under autocast and ``torch.utils.checkpoint`` too. ``torch.compile`` leaves the
calls as they are.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from gateloop_cpp import ops

Group = dist.ProcessGroup
F = TypeVar("F", bound=Callable[..., Any])


def _name(function: str, group: Group | None) -> str:
    chosen = dist.group.WORLD if group is None else group
    if chosen is None:
        raise ValueError(
            f"{function}: group must be a process group, got None before"
            " torch.distributed.init_process_group"
        )
    return chosen.group_name


def _outside_programs(function: F) -> F:
    """torch.compile traces no collective inside an operator: programs are cut around the call.

    Without torch.compile the call imports no compiler. That takes 0.9 s. Imported within a process
    group, it also keeps the group's threads after destroy_process_group(), and then one that frees
    a tensor as Python ends aborts the process.
    """
    cut = _disable_dynamo(function)

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        chosen = cut if torch.compiler.is_compiling() else function
        return chosen(*arguments, **options)

    return cast(F, call)


@_outside_programs
def _call(
    name: str, group: Group | None, sequences: tuple[Tensor, ...], *rest: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    operator = getattr(torch.ops.gateloop, f"time_sharded_{name}")
    y, final = operator(*sequences, _name(name, group), *rest, **options)
    return y, final


def linear_recurrence(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """The linear recurrence h_t = a_t h_{t-1} + x_t over the blocks of a group.

    Args:
        a, x: (B, T, D), this process's block, see :func:`gateloop_cpp.ops.linear_recurrence`.
        initial_state, cu_seqlens, mask, group: see :mod:`gateloop_cpp.distributed`.
        reverse: run from the last step of the whole to its first.

    Returns:
        h (B, T, D) of this block; and the state after the last step of the whole, (B, D) or (N, D).

    Raises:
        RuntimeError, TypeError, ValueError: naming the argument, what was expected and what came.
    """
    rest = (initial_state, reverse, cu_seqlens, mask)
    return _call("linear_recurrence", group, (a, x), *rest)


def gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    feature_map: Literal["none", "taylor"] = "none",
    *,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t^T v_t and y_t = q_t Re(S_t) over the blocks of a group.

    Args:
        q, k, v, a, feature_map: this process's block, see :func:`gateloop_cpp.ops.gate_loop`.
        initial_state, cu_seqlens, mask, group: see :mod:`gateloop_cpp.distributed`.
        reverse: run from the last step of the whole to its first.

    Returns:
        y (B, T, D) or (B, T, H, V) of this block; and the state after the last step of the whole,
        in the dtype of a and the shape of initial_state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    rest = (initial_state, reverse, cu_seqlens, mask)
    return _call("gate_loop", group, (q, k, v, a), *rest, feature_map=feature_map)


def polar_gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gate_loop` with max heads from the raw transition, over the blocks of a group.

    Args:
        q, k, v, z: this process's block, see :func:`gateloop_cpp.ops.polar_gate_loop`.
        initial_state, cu_seqlens, mask, group: see :mod:`gateloop_cpp.distributed`.
        reverse: run from the last step of the whole to its first.

    Returns:
        y (B, T, D) of this block; and the complex state after the last step of the whole, (B, D) or
        (N, D).

    Raises:
        RuntimeError, TypeError, ValueError: naming the argument, what was expected and what came.
    """
    rest = (initial_state, reverse, cu_seqlens, mask)
    return _call("polar_gate_loop", group, (q, k, v, z), *rest)


def simple_gate_loop(
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    normalize_input: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = σ(z_t) h_{t-1} + x_t, y_t = q_t h_t over the blocks of a group.

    Args:
        q, kv, z, normalize_input: this process's block, see
            :func:`gateloop_cpp.ops.simple_gate_loop`.
        initial_state, cu_seqlens, mask, group: see :mod:`gateloop_cpp.distributed`.
        reverse: run from the last step of the whole to its first.

    Returns:
        y (B, T, D) of this block; and the state after the last step of the whole, (B, D) or (N, D).

    Raises:
        RuntimeError, TypeError, ValueError: naming the argument, what was expected and what came.
    """
    rest = (initial_state, reverse, normalize_input, cu_seqlens, mask)
    return _call("simple_gate_loop", group, (q, kv, z), *rest)


class Recurrences(NamedTuple):
    """The functions of this module, of :mod:`gateloop_cpp.ops`."""

    linear_recurrence: Callable[..., tuple[Tensor, Tensor]]
    gate_loop: Callable[..., tuple[Tensor, Tensor]]
    polar_gate_loop: Callable[..., tuple[Tensor, Tensor]]
    simple_gate_loop: Callable[..., tuple[Tensor, Tensor]]


_HERE = Recurrences(ops.linear_recurrence, ops.gate_loop, ops.polar_gate_loop, ops.simple_gate_loop)
_SHARDED = Recurrences(linear_recurrence, gate_loop, polar_gate_loop, simple_gate_loop)


def recurrences(group: Group | None) -> Recurrences:
    """Over the blocks of a group, or without one of this process alone."""
    if group is None:
        return _HERE
    return Recurrences(*(partial(function, group=group) for function in _SHARDED))


@_outside_programs
def steps_before(last: Tensor, time: int, steps: int, *, group: Group) -> tuple[Tensor, int]:
    """What attention over a window reads of the blocks before this one.

    Args:
        last: (B, min(time, steps), ...), the last steps of this block of ``time`` steps.

    Returns:
        The last min(steps, begin) steps before this block, (B, ..., ...), and begin, the number of
        steps before this block.
    """
    before, begin = torch.ops.gateloop.time_sharded_steps_before(
        last, time, steps, _name("steps_before", group)
    )
    return before, begin
