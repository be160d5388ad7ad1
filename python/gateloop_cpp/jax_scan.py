"""The recurrence by JAX's associative scan, on the memory of the torch tensors."""

from typing import Any

import torch
from torch import Tensor

from gateloop_cpp._adjoint import adjoint

try:
    import jax
except ImportError as error:
    raise ImportError(
        "SimpleGateLoopLayer: use_jax_associative_scan=True needs jax: pip install jax"
    ) from error


def _combine(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    (a_left, x_left), (a_right, x_right) = left, right
    return a_right * a_left, a_right * x_left + x_right


@jax.jit
def _associative_scan(a: Any, x: Any) -> Any:
    return jax.lax.associative_scan(_combine, (a, x), axis=1)[1]


def _scan(a: Tensor, x: Tensor) -> Tensor:
    if a.numel() == 0:
        return torch.zeros_like(x)
    with jax.enable_x64(a.dtype == torch.float64):
        a_jax, x_jax = (jax.dlpack.from_dlpack(t.detach().contiguous()) for t in (a, x))
        return torch.utils.dlpack.from_dlpack(_associative_scan(a_jax, x_jax))


class _JaxScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        h = _scan(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        return adjoint(jax_associative_scan, a, h, dh)


def jax_associative_scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t over dimension 1, from h_0 = 0, by ``jax.lax.associative_scan``.

    Args:
        a, x: (B, T, D) real, one dtype of float32 and float64, on the CPU or a device JAX can use.

    Returns:
        h (B, T, D). Differentiable; ``torch.compile`` runs it outside of its graphs.
    """
    h: Tensor = _JaxScan.apply(a, x)  # type: ignore[no-untyped-call]
    return h
