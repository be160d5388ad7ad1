"""RMSNorm with the reference's floor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_cpp._checks import expect_positive


class RMSNorm(nn.Module):
    """y = x / max(‖x‖₂, 1e-12) · √dim · gamma over the last dimension.

    x (..., dim), any floating dtype, to the same shape. Parameter: gamma (dim), ones.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        expect_positive("RMSNorm", dim=dim)
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # √dim joins gamma, which is small, instead of taking a pass of its own over x.
        return F.normalize(x, dim=-1) * (self.gamma * self.scale)
