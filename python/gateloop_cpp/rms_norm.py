"""RMSNorm with the reference's floor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_cpp._checks import expect_positive


class RMSNorm(nn.Module):
    """y = x / max(‖x‖₂, ε) · √dim · gamma over the last dimension, so that zeros give zeros.

    x (..., dim), any floating dtype, to the same shape. ε is the reference's 1e-12, and in float16,
    where that is zero, the least positive number. Parameter: gamma (dim), ones.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        expect_positive("RMSNorm", dim=dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMSNorm as a function: x (..., dim), gamma (dim)."""
    # √dim joins gamma, which is small, instead of taking a pass of its own over x.
    floor = 2**-24 if x.dtype == torch.float16 else 1e-12
    return F.normalize(x, dim=-1, eps=floor) * (gamma * gamma.shape[0] ** 0.5)
