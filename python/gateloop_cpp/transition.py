"""What happens between the projection of a transition and the recurrence that uses it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


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


class _ScaleTangent(_ScaleGradient):
    """With a forward mode, which torch.compile refuses to trace."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, fraction: float) -> Tensor:
        # Of a view the tangent, which is scaled, would have to be a view too.
        return z.clone()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent * ctx.fraction


def scale_gradient(z: Tensor, fraction: float) -> Tensor:
    """z, whose gradient is scaled: the projection behind it learns more slowly."""
    # Under torch.func.vmap z.requires_grad is false, whatever z was computed from.
    forward_mode = forward_ad._current_level >= 0
    if fraction == 1.0 or not (torch.is_grad_enabled() or forward_mode):
        return z
    function = _ScaleTangent if forward_mode else _ScaleGradient
    scaled: Tensor = function.apply(z, fraction)  # type: ignore[no-untyped-call]
    return scaled


def drop_imaginary(z: Tensor) -> Tensor:
    """(..., 2 C) with (re, im) interleaved to the same with im = 0: ``ablate_complex``."""
    return (z.unflatten(-1, (-1, 2)) * z.new_tensor([1, 0])).flatten(-2)


def transition_of(z: Tensor, gate: str) -> Tensor:
    """Raw transitions z, of each the numbers that its gate takes, to a (..., C).

    "polar": σ(|z|) z/|z| of (re, im) pairs, 0.5 at z = 0; "magnitude_phase": σ(m) e^{iθ} of (m, θ)
    pairs, both complex; "sigmoid": σ(z), real (arXiv 2311.01927, section 3.2). bfloat16 and float16
    give float32 and complex64.
    """
    raw = _raw_numbers(z, gate)
    modulus, phase = _logit(raw, gate).sigmoid(), _phase(raw, gate)
    return modulus if phase is None else torch.polar(modulus, phase)


def rate_and_phase(z: Tensor, gate: str) -> tuple[Tensor, Tensor | None]:
    """-ln|a|, exact where |a| is near 1, and the phase of a: (..., C) each; a real a has none."""
    raw = _raw_numbers(z, gate)
    return F.softplus(-_logit(raw, gate)), _phase(raw, gate)


def input_scale(z: Tensor, gate: str, normalize: str) -> Tensor:
    """What the input is scaled by, (..., C): "mean" 1 - |a|, "variance" √(1 - |a|²)."""
    rest = (-_logit(_raw_numbers(z, gate), gate)).sigmoid()  # 1 - |a|, exact where |a| is near 1
    if normalize == "mean":
        return rest
    # The root's gradient at zero is infinite.
    return (rest * (2 - rest)).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def _raw_numbers(z: Tensor, gate: str) -> Tensor:
    """z in float32 at least, and a gate of two numbers' as (..., C, 2)."""
    wide = z if z.dtype == torch.float64 else z.float()
    return wide if gate == "sigmoid" else wide.unflatten(-1, (-1, 2))


def _phase(raw: Tensor, gate: str) -> Tensor | None:
    if gate == "sigmoid":
        return None
    return torch.view_as_complex(raw).angle() if gate == "polar" else raw[..., 1]


def _logit(raw: Tensor, gate: str) -> Tensor:
    """σ of which |a| is: (..., C)."""
    if gate == "sigmoid":
        return raw
    return torch.view_as_complex(raw).abs() if gate == "polar" else raw[..., 0]
