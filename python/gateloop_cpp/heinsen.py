"""The recurrence in log space (Heinsen 2023, arXiv 2311.06281), without its poles."""

from typing import Any

import torch
from torch import Tensor

from gateloop_cpp._adjoint import adjoint

# log 0 = -inf would make inf - inf of the sums below. e^-745 is the least positive float64, so that
# a transition of e^-800 is a zero to every result. The logarithms of 65,536 of them in a row add up
# to a number whose last digit is worth 1e-8.
_LEAST_LOG = -800.0


def _scan(a: Tensor, x: Tensor) -> Tensor:
    """With A_t = Σ_{s ≤ t} log a_s:   h_t = ± exp(A_t + log Σ_{s ≤ t} exp(log |x_s| - A_s)).

    Positive and negative inputs are summed apart, which spares the complex logarithm. In float64
    whatever the input: A_t grows with t, and its rounding is the error of the result.
    """
    log_a = a.double().log().clamp(min=_LEAST_LOG)
    total = log_a.cumsum(1)

    def positive_part(x: Tensor) -> Tensor:
        log_x = x.clamp(min=0).log()
        return (total + torch.logcumsumexp(log_x - total, dim=1)).exp()

    x = x.double()
    return (positive_part(x) - positive_part(-x)).to(a.dtype)


class _HeinsenScan(torch.autograd.Function):
    # The derivative of log |x| has a pole at 0; that of the recurrence has not. So the backward
    # pass is the recurrence's own adjoint, scanned in log space too.
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, x: Tensor) -> Tensor:
        return _scan(a, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        return adjoint(heinsen_scan, a, h, dh)


def heinsen_scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t over dimension 1, from h_0 = 0, through logarithms.

    Args:
        a: (B, T, ...) real transitions, 0 ≤ a; zeros, denormals and T = 65,536 included.
        x: (B, T, ...) real, any sign, the dtype of a.

    Returns:
        h (B, T, ...) in the dtype of a, finite wherever the recurrence is, as are its gradients.
        The rounding of A_t costs a relative error of about 1e-16 |A_t| in each term
        a_t ... a_{s+1} x_s: at T = 65,536 5e-12 for ordinary gates, and 1e-8, a tenth of float32's
        rounding, for a sequence of zeros.
    """
    h: Tensor = _HeinsenScan.apply(a, x)  # type: ignore[no-untyped-call]
    return h
