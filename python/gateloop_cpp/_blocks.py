"""SimpleGateLoopLayer block by block over time, the state carried from one to the next."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_cpp.ops import simple_gate_loop
from gateloop_cpp.rms_norm import rms_norm


def time_blocks(time: int, steps: int, reverse: bool) -> list[slice]:
    """Slices of ``steps`` steps, in the order in which the scan meets them."""
    starts = range(0, time, steps)
    return [slice(start, start + steps) for start in (reversed(starts) if reverse else starts)]


class TrainedInBlocks(torch.autograd.Function):
    """y (B, T, D) of x (B, T, D), gamma (D) or None for no norm, weight (3 D, D), and the state
    before the first step (B, D) or None.

    Kept for the backward pass: x, the projections, and one state in 16. The gradient of a
    projection, as large as the projection, becomes those of x and of the weight while its block is
    in cache, and never exists whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        weight: Tensor,
        initial: Tensor | None,
        reverse: bool,
        steps: int,
    ) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        kept, state = [], initial
        packed = torch.ops.gateloop._packed(weight)
        for block in time_blocks(x.shape[1], steps, reverse):
            projection = torch.ops.gateloop._linear(_norm(x[:, block], gamma), packed, None)
            y[:, block], state, checkpoints = torch.ops.gateloop._simple_gate_loop_forward(
                *projection.chunk(3, dim=-1), state, reverse, False
            )
            kept += [projection, checkpoints]
        ctx.save_for_backward(x, gamma, weight, initial, *kept)
        ctx.reverse, ctx.steps = reverse, steps
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        (dy,) = dys
        x, gamma, weight, initial, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            tensors = (x, gamma, weight, initial)
            return *_differentiable_backward(dy, *tensors, reverse=ctx.reverse), None, None

        needs_x, needs_gamma, needs_weight = ctx.needs_input_grad[:3]
        wide = torch.promote_types(x.dtype, torch.float32)
        # All like dy, to which torch.func.vmap may have added an axis.
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        dgamma = dy.new_zeros(x.shape[-1], dtype=wide)
        dweight = dy.new_zeros(weight.shape, dtype=wide)
        dstate = None
        packed = torch.ops.gateloop._packed(weight.t().contiguous())
        blocks = time_blocks(x.shape[1], ctx.steps, ctx.reverse)
        for i, block in reversed(list(enumerate(blocks))):
            projection, checkpoints = kept[2 * i : 2 * i + 2]
            *dprojection, dstate = torch.ops.gateloop._simple_gate_loop_backward(
                dy[:, block],
                dstate,
                *projection.chunk(3, dim=-1),
                checkpoints,
                ctx.reverse,
                False,
            )
            rows = torch.cat(dprojection, dim=-1).view(-1, weight.shape[0])
            with torch.enable_grad():
                part = x[:, block].detach().requires_grad_()
                gain = None if gamma is None else gamma.detach().requires_grad_()
                normed = _norm(part, gain)
            if needs_weight:
                dweight += rows.t() @ normed.detach().flatten(0, 1)
            if needs_x or needs_gamma:
                dnormed = torch.ops.gateloop._linear(rows, packed, None).view(normed.shape)
                if gain is None:
                    dx[:, block] = dnormed
                else:
                    dx[:, block], dgain = torch.autograd.grad(normed, (part, gain), dnormed)
                    dgamma += dgain
        return (
            dx if needs_x else None,
            dgamma.to(x.dtype) if needs_gamma else None,
            dweight.to(x.dtype) if needs_weight else None,
            dstate if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def _differentiable_backward(
    dy: Tensor, *tensors: Tensor | None, reverse: bool
) -> list[Tensor | None]:
    """The gradients with respect to ``tensors``, with a graph, through the layer's definition."""
    # One may be computed from another, as a cache is from the weights. Only through an alias of its
    # own does each receive what is its part and not also what flows through the others.
    aliases = [None if t is None else t.view_as(t) for t in tensors]
    x, gamma, weight, initial = aliases
    assert x is not None and weight is not None
    q, kv, z = F.linear(_norm(x, gamma), weight).chunk(3, dim=-1)
    y, _ = simple_gate_loop(q, kv, z, initial, reverse)
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if t is not None and t.requires_grad else None for t in aliases]


def _norm(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else rms_norm(x, gamma)
