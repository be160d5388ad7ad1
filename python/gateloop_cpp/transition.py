"""What happens between the projection of a transition and the recurrence that uses it."""

from typing import Any

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, fraction: float) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.fraction = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.fraction, None


def scale_gradient(z: Tensor, fraction: float) -> Tensor:
    """z, whose gradient is scaled: the projection behind it learns more slowly."""
    # Under torch.func.vmap z.requires_grad is false, whatever z was computed from.
    if fraction == 1.0 or not torch.is_grad_enabled():
        return z
    scaled: Tensor = _ScaleGradient.apply(z, fraction)  # type: ignore[no-untyped-call]
    return scaled


def drop_imaginary(z: Tensor) -> Tensor:
    """(..., 2 C) with (re, im) interleaved to the same with im = 0: ``ablate_complex``."""
    return (z.unflatten(-1, (-1, 2)) * z.new_tensor([1, 0])).flatten(-2)


def polar_gate(z: Tensor) -> Tensor:
    """a = σ(|z|) z/|z|: (..., 2 C) with (re, im) interleaved to (..., C) complex.

    a = 0.5 at z = 0 (arXiv 2311.01927, section 3.2). bfloat16 and float16 give complex64.
    """
    wide = z if z.dtype == torch.float64 else z.float()
    raw = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.polar(raw.abs().sigmoid(), raw.angle())
