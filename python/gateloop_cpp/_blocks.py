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
            q, kv, z = F.linear(_norm(x, gamma), weight).chunk(3, dim=-1)
            y, _ = simple_gate_loop(q, kv, z, initial, ctx.reverse)
            needed = ctx.needs_input_grad[:4]
            wanted = [
                t for t, need in zip((x, gamma, weight, initial), needed, strict=True) if need
            ]
            grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(grads) if need else None for need in needed), None, None

        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.empty_like(x)
        dgamma = x.new_zeros(x.shape[-1], dtype=wide)
        dweight = torch.zeros_like(weight, dtype=wide)
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
            rows = torch.cat(dprojection, dim=-1).flatten(0, 1)
            with torch.enable_grad():
                part = x[:, block].detach().requires_grad_()
                gain = None if gamma is None else gamma.detach().requires_grad_()
                normed = _norm(part, gain)
            dweight += rows.t() @ normed.detach().flatten(0, 1)
            inputs = [part] if gain is None else [part, gain]
            dnormed = torch.ops.gateloop._linear(rows, packed, None).view_as(normed)
            found = torch.autograd.grad(normed, inputs, dnormed)
            dx[:, block] = found[0]
            dgamma += sum(found[1:])
        of_gamma = None if gamma is None else dgamma.to(gamma.dtype)
        of_initial = None if initial is None else dstate
        return dx, of_gamma, dweight.to(weight.dtype), of_initial, None, None


def _norm(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else rms_norm(x, gamma)
